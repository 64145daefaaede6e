//! What this host is: kernel, kind of KVM, and what it says about performance counters.

use std::fs;
use std::path::Path;

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use super::pmu;

/// What runs guest code on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KvmKind {
    /// Intel VT-x.
    Vmx,
    /// AMD-V.
    Svm,
    /// No hardware virtualization underneath: ring 0 of the guest is emulated and ring 3 runs natively.
    Software,
}

impl KvmKind {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vmx => "KVM on Intel VT-x",
            Self::Svm => "KVM on AMD-V",
            Self::Software => "KVM without hardware virtualization",
        }
    }
}

/// What the kernel's files say about KVM. Read before the process is confined: a jail has no such files.
#[derive(Clone, Copy, Debug)]
pub struct Module {
    has_amd: bool,
    has_intel: bool,
    /// Module parameter `kvm.enable_pmu`; none on kernels before 5.17.
    pub enable_pmu: Option<bool>,
    /// Module parameter `kvm.ignore_msrs`.
    pub ignore_msrs: Option<bool>,
    /// Module parameter `nested` of the vendor's module: whether guests may run guests.
    pub nested: Option<bool>,
}

impl Module {
    /// Reads them. A file that is not there is an answer too.
    pub fn read() -> Self {
        Self {
            has_amd: Path::new("/sys/module/kvm_amd").exists(),
            has_intel: Path::new("/sys/module/kvm_intel").exists(),
            enable_pmu: flag("kvm", "enable_pmu"),
            ignore_msrs: flag("kvm", "ignore_msrs"),
            nested: flag("kvm_amd", "nested").or_else(|| flag("kvm_intel", "nested")),
        }
    }

    /// Tells by the module of the processor's vendor, which is listed whether it is loaded or built in.
    pub fn kind(&self, is_amd: bool) -> KvmKind {
        match is_amd {
            true if self.has_amd => KvmKind::Svm,
            false if self.has_intel => KvmKind::Vmx,
            _ => KvmKind::Software,
        }
    }
}

/// Everything about the host that a verdict depends on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostInfo {
    /// Kernel release.
    pub kernel: String,
    /// Kind of KVM.
    pub kvm: KvmKind,
    /// Module parameter `kvm.enable_pmu`; none on kernels before 5.17.
    pub enable_pmu: Option<bool>,
    /// `KVM_CAP_PMU_CAPABILITY` (212) as `KVM_CHECK_EXTENSION` gives it: bit 0 if a machine's PMU can be disabled.
    pub cap_212: i32,
    /// Module parameter `kvm.ignore_msrs`: if set, accesses to unknown registers look successful.
    pub ignore_msrs: Option<bool>,
}

impl HostInfo {
    /// Asks the kernel; the kind of KVM is known from the launch.
    pub fn new(kvm: &Kvm, kind: KvmKind, module: Module) -> Self {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        Self {
            kernel,
            kvm: kind,
            enable_pmu: module.enable_pmu,
            cap_212: pmu::disable_capability(kvm),
            ignore_msrs: module.ignore_msrs,
        }
    }
}

/// A Y/N parameter of a module.
fn flag(module: &str, name: &str) -> Option<bool> {
    let path = Path::new("/sys/module").join(module).join("parameters").join(name);
    let text = fs::read_to_string(path).ok()?;
    match text.trim() {
        "Y" | "1" => Some(true),
        "N" | "0" => Some(false),
        _ => None,
    }
}
