//! Device models. They know the bus they answer on and guest memory, never KVM.

pub mod block;
pub mod console;
pub mod ioapic;
pub mod nmi_status;
pub mod pmu;
pub mod reset_ports;
pub mod rng;
pub mod virtio;
pub mod vsock;
