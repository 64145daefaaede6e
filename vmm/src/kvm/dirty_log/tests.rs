//! A vCPU of the real KVM writes RAM, and so does the host. Needs `/dev/kvm`.

use kvm_ioctls::VcpuExit;
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::cpuid;
use crate::kvm::host::Module;
use crate::kvm::pmu::PmuPolicy;
use crate::kvm::vcpu::Vcpu;
use crate::kvm::vm::Vm;
use crate::memory::{Backing, GuestRam, Memory, MemoryError, Template};

const RAM: u64 = 4 << 20;

/// Where the code is.
const CODE: u64 = 0x1000;

/// In real mode: reads a byte, writes it elsewhere, and says what it was.
pub(crate) const COPY: [u8; 10] = [
    0xa0, 0x00, 0x50, // mov al, [0x5000]
    0xa2, 0x00, 0x90, // mov [0x9000], al
    0xe6, 0x10, // out 0x10, al
    0xeb, 0xf6, // again
];

/// Fields are dropped in this order.
pub(crate) struct Machine {
    vcpu: Vcpu,
    vm: Vm,
    memory: Memory,
}

fn template(byte: u8) -> Template {
    let load = |ram: &GuestRam| {
        ram.write_slice(&COPY, GuestAddress(CODE)).unwrap();
        ram.write_obj(byte, GuestAddress(0x5000)).unwrap();
        Ok::<_, MemoryError>(())
    };
    Template::build(RAM, load).unwrap().0
}

impl Machine {
    fn new(tracks: bool) -> Self {
        let memory = Memory::map(Backing::contents(&template(1), u64::MAX).unwrap()).unwrap();
        if tracks {
            memory.track_writes();
        }
        Self::of(memory)
    }

    /// A machine whose RAM has the code above.
    pub(crate) fn of(memory: Memory) -> Self {
        let kvm = crate::kvm::open().expect("this test needs KVM: /dev/kvm that it may open");
        let (supported, kind) = cpuid::supported(&kvm, Module::read(), PmuPolicy::Off).unwrap();
        let vm = Vm::new(&kvm, Module::read(), kind, &memory, PmuPolicy::Off).unwrap();
        let vcpu = vm.create_vcpu(&supported, 0, 1).unwrap();
        let mut sregs = vcpu.fd.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.fd.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.fd.get_regs().unwrap();
        regs.rip = CODE;
        vcpu.fd.set_regs(&regs).unwrap();
        Self { vcpu, vm, memory }
    }

    /// Lets the guest go once through its loop; what it read.
    pub(crate) fn run(&mut self) -> u8 {
        loop {
            match self.vcpu.fd.run() {
                Ok(VcpuExit::IoOut(0x10, data)) => return data[0],
                Ok(exit) => panic!("{exit:?}"),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn dirty(&self) -> Vec<(u64, u64)> {
        self.vm.take_dirty(&self.memory).unwrap().unwrap().runs().collect()
    }
}

#[test]
fn what_guest_and_host_write_is_noted_once() {
    let mut machine = Machine::new(true);
    assert_eq!(machine.dirty(), []);
    assert_eq!(machine.run(), 1);
    assert_eq!(machine.dirty(), [(9, 1)], "the guest");
    assert_eq!(machine.dirty(), []);
    machine.memory.ram().write_slice(&[7; 0x1001], GuestAddress(0x4fff)).unwrap();
    machine.memory.ram().write_obj(1_u8, GuestAddress(RAM - 1)).unwrap();
    assert_eq!(machine.dirty(), [(4, 2), (RAM / 4096 - 1, 1)], "the host");
    assert_eq!(machine.run(), 7);
    // Whose turn it is does not matter.
    machine.memory.ram().write_obj(1_u8, GuestAddress(0x2000)).unwrap();
    assert_eq!(machine.dirty(), [(2, 1), (9, 1)], "both");
}

#[test]
fn a_reset_has_written_all_that_it_puts_back() {
    let mut machine = Machine::new(true);
    machine.memory.restore_below(0x6000).unwrap();
    assert_eq!(machine.dirty(), [(0, 6)]);
    machine.memory.restore().unwrap();
    assert_eq!(machine.dirty(), [(0, RAM / 4096)]);
    let other = Backing::contents(&template(2), u64::MAX).unwrap();
    machine.memory.replace(other).unwrap();
    assert_eq!(machine.dirty(), [(0, RAM / 4096)]);
    assert_eq!(machine.run(), 2);
    assert_eq!(machine.dirty(), [(9, 1)], "the log goes on");
}

#[test]
fn nothing_is_noted_unless_it_is_asked_for() {
    let mut machine = Machine::new(false);
    machine.run();
    assert_eq!(machine.vm.take_dirty(&machine.memory).unwrap(), None);
    assert!(!machine.memory.tracks_writes());
}

#[test]
fn a_running_guest_finds_what_was_put_behind_its_ram() {
    let mut machine = Machine::new(false);
    assert_eq!(machine.run(), 1);
    let written =
        |machine: &Machine| machine.memory.ram().read_obj::<u8>(GuestAddress(0x9000)).unwrap();
    assert_eq!(written(&machine), 1);
    let contents = |template: &_| Backing::contents(template, 0);
    let backings = [(3, Backing::private as fn(&_) -> _), (5, Backing::copy), (6, contents)];
    for (byte, backing) in backings {
        machine.memory.replace(backing(&template(byte)).unwrap()).unwrap();
        assert_eq!(written(&machine), 0);
        assert_eq!(machine.run(), byte);
        machine.memory.ram().write_obj(4_u8, GuestAddress(0x5000)).unwrap();
        assert_eq!((machine.run(), written(&machine)), (4, 4));
        // It is what a reset puts back from now on.
        machine.memory.restore().unwrap();
        assert_eq!((written(&machine), machine.run()), (0, byte));
    }
}
