//! The guest's time stamp counter. A reset sets it back by its offset: a write to the register itself would be taken for an
//! attempt to synchronize with another vCPU, and ignored, whenever it comes within a second of the last one.

use std::io;
use std::os::fd::AsRawFd;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, Msrs, kvm_device_attr, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::KvmError;

const MSR_TSC: u32 = 0x10;

use request::{KVM_GET_DEVICE_ATTR, KVM_SET_DEVICE_ATTR};

/// Request numbers; kvm-ioctls has them for other architectures alone.
mod request {
    use kvm_bindings::{KVMIO, kvm_device_attr};
    use vmm_sys_util::ioctl_iow_nr;

    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
}

/// What KVM adds to the host's counter for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TscOffset(u64);

impl TscOffset {
    /// The offset with which the counter of `vcpu` would start at zero now.
    ///
    /// # Errors
    /// [`KvmError`] naming the request.
    pub fn from_now(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let mut msrs =
            Msrs::from_entries(&[kvm_msr_entry { index: MSR_TSC, ..Default::default() }])
                .map_err(|_| KvmError::Capability("room for one MSR"))?;
        vcpu.get_msrs(&mut msrs).map_err(KvmError::request("get the time stamp counter"))?;
        let Self(offset) = Self::of(vcpu)?;
        Ok(Self(offset.wrapping_sub(msrs.as_slice()[0].data)))
    }

    /// The offset of `vcpu`.
    ///
    /// # Errors
    /// [`KvmError`] naming the request.
    pub fn of(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let mut offset = 0;
        let action = "get the offset of the time stamp counter";
        attribute(vcpu, KVM_GET_DEVICE_ATTR(), &mut offset, action)?;
        Ok(Self(offset))
    }

    /// What a counter with this offset shows when one with the offset `zero` shows 0.
    pub fn since(self, zero: Self) -> u64 {
        self.0.wrapping_sub(zero.0)
    }

    /// The offset of a counter that shows `ticks` when one with this offset shows 0.
    pub fn plus(self, ticks: u64) -> Self {
        Self(self.0.wrapping_add(ticks))
    }

    /// Gives `vcpu` this offset.
    ///
    /// # Errors
    /// [`KvmError`] naming the request.
    pub fn apply(mut self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        attribute(
            vcpu,
            KVM_SET_DEVICE_ATTR(),
            &mut self.0,
            "set the offset of the time stamp counter",
        )
    }
}

/// Gets or sets the attribute (Linux 5.16, `Documentation/virt/kvm/devices/vcpu.rst`, section 4.1).
fn attribute(
    vcpu: &VcpuFd,
    request: u64,
    value: &mut u64,
    action: &'static str,
) -> Result<(), KvmError> {
    let attribute = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
        ..Default::default()
    };
    // SAFETY: `request` is one of the two above, for a vCPU; KVM reads or writes the eight bytes at `addr`, which `value`
    // borrows for the call.
    let result = unsafe { ioctl_with_ref(&vcpu.as_raw_fd(), request, &attribute) };
    match result {
        0 => Ok(()),
        _ => Err(KvmError::Request { action, source: io::Error::last_os_error() }),
    }
}
