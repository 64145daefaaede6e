//! Which host a guest has seen: what has to agree where a guest goes on that was stopped elsewhere.

use std::fmt;

use kvm_bindings::CpuId;
use serde::{Deserialize, Serialize};

use super::cpuid::{AMD_EXTENDED_FEATURES, Leaf, TIMING};
use super::host::KvmKind;

/// How far two counters may be apart to count as the same, in millionths: what KVM takes for the same too (its module parameter
/// `tsc_tolerance_ppm`).
const TSC_TOLERANCE_PPM: u64 = 250;

/// What a guest can tell of its host and would not forgive to see changed, and the kernel for information.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostIdentity {
    /// The processor.
    pub processor: Processor,
    /// Words of CPUID leaves with a bit for each feature that guests may have here; see [`HostIdentity::new`].
    features: [u32; 8],
    /// What runs the guest.
    pub kvm: KvmKind,
    /// Frequency of the guest's time stamp counter; 0 if KVM does not tell.
    pub tsc_khz: u32,
    /// Kernel release. Nothing depends on it.
    pub kernel: String,
}

/// A processor by its family and model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processor {
    /// The vendor's twelve letters.
    vendor: [u8; 12],
    /// Leaf 1, EAX, without the stepping.
    signature: u32,
}

impl fmt::Display for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Intel SDM volume 2, CPUID leaf 01H: "extended" parts count where the short ones are at their end.
        let bits = |shift: u32, mask: u32| self.signature >> shift & mask;
        let family = match bits(8, 0xf) {
            0xf => 0xf + bits(20, 0xff),
            short => short,
        };
        let model = bits(16, 0xf) << 4 | bits(4, 0xf);
        write!(f, "{} family {family:#x} model {model:#x}", self.vendor.escape_ascii())
    }
}

/// In what two hosts differ so that a guest of one cannot go on at the other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HostMismatch {
    /// Another processor.
    #[error("a processor {saved}, and this one is {here}")]
    Processor {
        /// Of the snapshot.
        saved: Processor,
        /// Of this host.
        here: Processor,
    },
    /// Another kind of KVM.
    #[error("{}, and this host has {}", saved.name(), here.name())]
    Kvm {
        /// Of the snapshot.
        saved: KvmKind,
        /// Of this host.
        here: KvmKind,
    },
    /// Features that are not here.
    #[error("a processor with features that this one does not offer to guests (CPUID words {0})")]
    Features(String),
    /// Another frequency.
    #[error("a time stamp counter of {saved} kHz, and this host's has {here} kHz")]
    Tsc {
        /// Of the snapshot.
        saved: u32,
        /// Of this host.
        here: u32,
    },
}

impl HostIdentity {
    /// Of a host that has given a vCPU `cpuid`.
    pub fn new(cpuid: &CpuId, kvm: KvmKind) -> Self {
        let leaf = |function| Leaf::get(cpuid, function, 0);
        let (first, features, extended) = (leaf(0), leaf(1), leaf(AMD_EXTENDED_FEATURES));
        let (structured, state) = (leaf(7), leaf(0xd));
        let mut vendor = [0; 12];
        for (letters, word) in vendor.chunks_mut(4).zip([first.ebx, first.edx, first.ecx]) {
            letters.copy_from_slice(&word.to_le_bytes());
        }
        Self {
            processor: Processor { vendor, signature: features.eax & !0xf },
            features: [
                features.ecx,
                features.edx,
                structured.ebx,
                structured.ecx,
                structured.edx,
                extended.ecx,
                extended.edx,
                state.eax,
            ],
            kvm,
            tsc_khz: leaf(TIMING).eax,
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        }
    }

    /// Whether a guest that has lived here can go on at the host `here`.
    ///
    /// # Errors
    /// The first thing in which they differ.
    pub fn check(&self, here: &Self) -> Result<(), HostMismatch> {
        if self.processor != here.processor {
            let (saved, here) = (self.processor, here.processor);
            return Err(HostMismatch::Processor { saved, here });
        }
        if self.kvm != here.kvm {
            return Err(HostMismatch::Kvm { saved: self.kvm, here: here.kvm });
        }
        let words = self.features.iter().zip(&here.features).enumerate();
        let missing: Vec<_> = words
            .filter(|(_, (saved, here))| *saved & !*here != 0)
            .map(|(word, (saved, here))| format!("{word}: {:#x}", saved & !here))
            .collect();
        if !missing.is_empty() {
            return Err(HostMismatch::Features(missing.join(", ")));
        }
        let (saved, here) = (self.tsc_khz, here.tsc_khz);
        let apart = u64::from(saved.abs_diff(here)) * 1_000_000;
        if apart > u64::from(saved) * TSC_TOLERANCE_PPM {
            return Err(HostMismatch::Tsc { saved, here });
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A host that does not exist.
    pub(crate) fn host() -> HostIdentity {
        HostIdentity {
            processor: Processor { vendor: *b"GenuineIntel", signature: 0x000c_06f0 },
            features: [0xf; 8],
            kvm: KvmKind::Vmx,
            tsc_khz: 2_000_000,
            kernel: "6.1".into(),
        }
    }

    #[test]
    fn hosts_that_differ_in_what_counts_are_refused() {
        let check = |change: fn(&mut HostIdentity), expected: Option<&str>| {
            let mut here = host();
            change(&mut here);
            let found = host().check(&here).err().map(|error| error.to_string());
            assert_eq!(found.as_deref(), expected);
        };
        check(|_| {}, None);
        check(|here| here.kernel = "6.2".into(), None);
        check(|here| here.features[3] |= 0x10, None);
        check(|here| here.tsc_khz += 499, None);
        check(
            |here| here.tsc_khz -= 501,
            Some("a time stamp counter of 2000000 kHz, and this host's has 1999499 kHz"),
        );
        check(
            |here| here.features[7] = 0xb,
            Some(
                "a processor with features that this one does not offer to guests (CPUID words 7: 0x4)",
            ),
        );
        check(
            |here| here.kvm = KvmKind::Software,
            Some("KVM on Intel VT-x, and this host has KVM without hardware virtualization"),
        );
        check(
            |here| here.processor = Processor { vendor: *b"AuthenticAMD", signature: 0x00a2_0f10 },
            Some(
                "a processor GenuineIntel family 0x6 model 0xcf, and this one is AuthenticAMD family 0x19 model 0x21",
            ),
        );
    }
}
