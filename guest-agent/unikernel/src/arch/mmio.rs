//! Device registers in the window from 3 to 4 GiB, which the page tables map uncached and no memory lies in.

use core::cell::Cell;

const WINDOW: core::ops::Range<u64> = 0xc000_0000..0x1_0000_0000;

/// A device's 32-bit registers.
pub struct Registers {
    base: u64,
    size: u64,
    accesses: Cell<u32>,
}

impl Registers {
    /// The registers at this place; `None` if it is not in the device window or not aligned.
    pub fn at(base: u64, size: u64) -> Option<Self> {
        let end = base.checked_add(size)?;
        let inside = WINDOW.start <= base && end <= WINDOW.end && base.is_multiple_of(4);
        inside.then_some(Self { base, size, accesses: Cell::new(0) })
    }

    /// Reads one.
    pub fn read(&self, offset: u64) -> u32 {
        // SAFETY: `address` keeps it in the window, where reading touches no memory of Rust's.
        unsafe { self.address(offset).read_volatile() }
    }

    /// Writes one.
    pub fn write(&self, offset: u64, value: u32) {
        // SAFETY: as for reading. What the device does to memory in turn is the business of `dma`, which alone tells a
        // device addresses of memory.
        unsafe { self.address(offset).write_volatile(value) }
    }

    /// How many accesses there were; each may be an exit to the monitor.
    pub fn accesses(&self) -> u32 {
        self.accesses.get()
    }

    fn address(&self, offset: u64) -> *mut u32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.size, "register {offset:#x}");
        self.accesses.set(self.accesses.get().wrapping_add(1));
        (self.base + offset) as *mut u32
    }
}
