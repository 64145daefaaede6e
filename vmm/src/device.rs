//! Device models. They know the bus they answer on and guest memory, never KVM.

pub mod virtio;
pub mod vsock;
