//! Device registers in the window from 3 to 4 GiB, which the page tables map uncached and no memory lies in.
//!
//! Where ring 0 is emulated, an access that the monitor answers costs 35 us from ring 3 but 9 us from ring 0, so accesses
//! are carried out by the gate (`gate::access_registers`), together where there are several.

const WINDOW: core::ops::Range<u64> = 0xc000_0000..0x1_0000_0000;

/// Address of a 32-bit register in the device window; only [`Registers`] makes them. Accessing it touches no memory of
/// Rust's. What a device does to memory in turn is the business of `dma`, which alone tells devices addresses of memory.
#[derive(Clone, Copy)]
pub struct RegisterAddress(u32);

impl RegisterAddress {
    /// The address.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// A device's 32-bit registers.
#[derive(Clone, Copy)]
pub struct Registers {
    base: u64,
    size: u64,
}

impl Registers {
    /// The registers at this place; `None` if it is not in the device window or not aligned.
    pub fn at(base: u64, size: u64) -> Option<Self> {
        let end = base.checked_add(size)?;
        let inside = WINDOW.start <= base && end <= WINDOW.end && base.is_multiple_of(4);
        inside.then_some(Self { base, size })
    }

    /// Whether there is one at this place.
    pub fn contain(&self, offset: u64) -> bool {
        offset + 4 <= self.size
    }

    /// Writes one from ring 3, which is the cheapest where the monitor is not involved: notifications.
    pub fn write_now(&self, offset: u64, value: u32) {
        let register = self.address(offset).get() as usize as *mut u32;
        // SAFETY: see `RegisterAddress`.
        unsafe { register.write_volatile(value) }
    }

    /// The address of one.
    ///
    /// # Panics
    /// If there is no such register.
    pub fn address(&self, offset: u64) -> RegisterAddress {
        assert!(offset.is_multiple_of(4) && self.contain(offset), "register {offset:#x}");
        // The window ends at 4 GiB.
        RegisterAddress((self.base + offset) as u32)
    }
}

/// An access to one register. Ring 0 (gate.s) knows the layout, and copies a word `from` one address `to` another: that of
/// the register and that of `value`.
#[repr(C)]
pub struct Access {
    from: u32,
    to: u32,
    value: u32,
    register: RegisterAddress,
    writes: bool,
}

impl Access {
    /// To be read.
    pub fn read(register: RegisterAddress) -> Self {
        Self { from: 0, to: 0, value: 0, register, writes: false }
    }

    /// To be written.
    pub fn write(register: RegisterAddress, value: u32) -> Self {
        Self { from: 0, to: 0, value, register, writes: true }
    }

    /// What was read.
    pub fn value(&self) -> u32 {
        self.value
    }

    /// Fills the addresses in; to be called where the access will stay while ring 0 carries it out.
    pub(super) fn aim(&mut self) {
        // The agent's memory ends below 1 GiB and is identity-mapped.
        let value = (&raw mut self.value) as usize as u32;
        let register = self.register.get();
        (self.from, self.to) = if self.writes { (value, register) } else { (register, value) };
    }
}
