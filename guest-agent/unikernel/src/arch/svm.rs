//! AMD's virtualization (SVM) in the guest itself, to see what the host makes of it. Registers and offsets: AMD64 Architecture
//! Programmer's Manual volume 2, sections 15.4, 15.5.1 and appendices A and B.

use alloc::format;
use alloc::string::String;

use agent::pmu::{MsrOperation, Msrs};

use super::gate::{self, CpuMsrs};

const EFER: u32 = 0xc000_0080;
const EFER_SVME: u64 = 1 << 12;
/// Where the processor may keep the state of whoever executes `vmrun`.
const VM_HSAVE_PA: u32 = 0xc001_0117;

/// Words of a page, and which of them is EXITCODE of a control block.
const WORDS: usize = 512;
const EXIT_CODE: usize = 0x70 / 8;
/// No exit code, in either half.
const MARK: u64 = 0x1eaf_1eaf_1eaf_1eaf;

#[repr(C, align(4096))]
struct Page([u64; WORDS]);

// Behind what other lives touch.
#[unsafe(link_section = ".bss.large.svm")]
static mut CONTROL_BLOCK: Page = Page([0; WORDS]);
#[unsafe(link_section = ".bss.large.svm")]
static mut HOST_SAVE: Page = Page([0; WORDS]);

/// EXITCODE before and after a `vmrun` that has to fail: the control block is empty, so it does not intercept `vmrun` itself
/// and has no address space number. The processor has SVM. `Err` says which register refuses what it takes.
pub fn failed_vmrun() -> Result<[u64; 2], String> {
    let mut old = [MsrOperation::read(EFER), MsrOperation::read(VM_HSAVE_PA)];
    CpuMsrs.run(&mut old);
    let [Some(efer), Some(host_save)] = old.map(|register| register.result()) else {
        return Err("EFER or VM_HSAVE_PA cannot be read".into());
    };
    // In this order: without SVME the second register may not be there.
    set(EFER, efer | EFER_SVME)?;
    let tried = set(VM_HSAVE_PA, (&raw const HOST_SAVE) as u64).map(|()| {
        let block = &raw mut CONTROL_BLOCK;
        let mut page = Page([0; WORDS]);
        page.0[EXIT_CODE] = MARK;
        // SAFETY: nobody else uses the page, and there is one thread.
        unsafe { block.write_volatile(page) };
        gate::vmrun(block as u64);
        // SAFETY: as above; the processor has written plain words.
        [MARK, unsafe { (&raw const (*block).0[EXIT_CODE]).read_volatile() }]
    });
    set(VM_HSAVE_PA, host_save)?;
    set(EFER, efer)?;
    tried
}

fn set(index: u32, value: u64) -> Result<(), String> {
    let mut write = [MsrOperation::write(index, value)];
    CpuMsrs.run(&mut write);
    match write[0].result() {
        Some(_) => Ok(()),
        None => Err(format!("MSR {index:#x} refuses {value:#x}")),
    }
}
