//! Intel's virtualization (VMX) in the guest itself, to see what the host makes of it. Registers, regions and fields: Intel SDM
//! volume 3, sections 24.2 and 24.11, appendices A and B.

use alloc::format;
use alloc::string::String;

use agent::pmu::{MsrOperation, Msrs};
use agent_protocol::VmcsFields;

use super::gate::{self, CpuMsrs};

const FEATURE_CONTROL: u32 = 0x3a;
/// Locked, and VMX is allowed outside of SMX.
const VMX_ALLOWED: u64 = 1 << 2 | 1;
const VMX_BASIC: u32 = 0x480;
const VMX_VMCS_ENUM: u32 = 0x48a;

/// Encodings: four widths, four types, 512 indices, for full accesses.
const FIELDS: usize = 4 * 4 * 512;
/// TSC_MULTIPLIER: 64 bits wide, a control, index 0x19.
const TSC_MULTIPLIER: usize = 1 << 11 | 0x19;
/// What [`Scan::steps`] says in the end.
const ALL_STEPS: u64 = 3;

#[repr(C, align(4096))]
struct Page([u32; 1024]);

/// What ring 0 is given, and gives (gate.s).
#[repr(C)]
pub(super) struct Scan {
    vmxon: u64,
    vmcs: u64,
    /// How many of `vmxon`, `vmclear` and `vmptrld` succeeded.
    steps: u64,
    error: u64,
    readable: [u8; FIELDS],
}

// Behind what other lives touch.
#[unsafe(link_section = ".bss.large.vmx")]
static mut VMXON: Page = Page([0; 1024]);
#[unsafe(link_section = ".bss.large.vmx")]
static mut VMCS: Page = Page([0; 1024]);
#[unsafe(link_section = ".bss.large.vmx")]
static mut SCAN: Scan = Scan { vmxon: 0, vmcs: 0, steps: 0, error: 0, readable: [0; FIELDS] };

/// Which fields of an empty VMCS can be read. The processor has VMX. `Err` says what it refuses.
pub fn vmcs_fields() -> Result<VmcsFields, String> {
    let registers = [FEATURE_CONTROL, VMX_BASIC, VMX_VMCS_ENUM];
    let mut registers = registers.map(MsrOperation::read);
    CpuMsrs.run(&mut registers);
    let [Some(control), Some(basic), Some(vmcs_enum)] = registers.map(|read| read.result()) else {
        return Err("the registers of VMX cannot be read".into());
    };
    if control & VMX_ALLOWED != VMX_ALLOWED {
        let mut write = [MsrOperation::write(FEATURE_CONTROL, control | VMX_ALLOWED)];
        CpuMsrs.run(&mut write);
        if write[0].result().is_none() {
            return Err(format!("IA32_FEATURE_CONTROL is {control:#x}, which does not allow VMX"));
        }
    }
    let revision = basic as u32 & 0x7fff_ffff;
    let (vmxon, vmcs, scan) = (&raw mut VMXON, &raw mut VMCS, &raw mut SCAN);
    // SAFETY: nobody else uses these, and there is one thread.
    unsafe {
        (&raw mut (*vmxon).0[0]).write_volatile(revision);
        (&raw mut (*vmcs).0[0]).write_volatile(revision);
        (&raw mut (*scan).vmxon).write_volatile(vmxon as u64);
        (&raw mut (*scan).vmcs).write_volatile(vmcs as u64);
    }
    gate::scan_vmcs(scan as u64);
    // SAFETY: as above; ring 0 has written plain numbers, and does not run now.
    let scan = unsafe { &*scan };
    if scan.steps != ALL_STEPS {
        let instruction = ["vmxon", "vmclear", "vmptrld"].get(scan.steps as usize);
        return Err(format!("{} fails", instruction.unwrap_or(&"VMX")));
    }
    let readable = || (0..FIELDS).filter(|number| scan.readable[*number] != 0);
    let highest = readable().max_by_key(|number| number & 0x1ff).unwrap_or_default();
    Ok(VmcsFields {
        vmcs_enum,
        readable: readable().count() as u32,
        highest: ((highest & 0x7ff) << 1 | highest >> 11 << 13) as u32,
        tsc_multiplier: scan.readable[TSC_MULTIPLIER] != 0,
        error: scan.error,
    })
}
