//! What Firecracker has no words for.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Refusal;
use crate::device::pmu::Shape;
use crate::device::virtio::audit::AuditMode;
use crate::kvm::pmu::PmuPolicy;

/// What becomes of a machine whose guest asks for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum GuestReset {
    /// It is reset in place.
    InPlace,
    /// It ends, and this process with it, as Firecracker's does.
    End,
}

/// `PUT /cleanslate/machine`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Own {
    /// Performance counters of the guest.
    #[serde(default)]
    pub pmu: PmuPolicy,
    /// Emulated counters: 1 is AMD's legacy or core set, 2 is PerfMonV2.
    #[serde(default)]
    pub pmu_version: Option<u8>,
    /// How many emulated counters.
    #[serde(default)]
    pub pmu_counters: Option<u8>,
    /// How often events happen on emulated counters.
    #[serde(default)]
    pub pmu_seed: u64,
    /// Virtio devices offer `VIRTIO_F_ACCESS_PLATFORM`.
    #[serde(default)]
    pub dma_platform: bool,
    /// What is looked for in the buffers that the guest posts.
    #[serde(default)]
    pub dma_audit: AuditMode,
    /// A reset that the guest asks for: by default in place with the agent, the end with a kernel.
    #[serde(default)]
    pub on_guest_reset: Option<GuestReset>,
    /// Another socket of vsock, for clients that send messages.
    #[serde(default)]
    pub uds_seqpacket_path: Option<PathBuf>,
}

impl Own {
    /// Refuses what contradicts itself.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check(&self) -> Result<(), Refusal> {
        let described =
            self.pmu_version.is_some() || self.pmu_counters.is_some() || self.pmu_seed != 0;
        if described && self.pmu != PmuPolicy::Emulated {
            return Err(Refusal::new(
                "pmu_version, pmu_counters and pmu_seed describe emulated counters: add \"pmu\": \"emulated\"",
            ));
        }
        self.shape().map(|_| ())
    }

    /// What emulated counters are.
    ///
    /// # Errors
    /// [`Refusal`] for a set that AMD never made.
    pub fn shape(&self) -> Result<Shape, Refusal> {
        Shape::new(self.pmu_version.unwrap_or(2), self.pmu_counters.unwrap_or(6))
            .map_err(|error| Refusal::new(error.to_string()))
    }
}
