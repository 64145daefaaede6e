//! The machine's virtio side: the MMIO transport and the vsock device.

mod transport;
mod vsock_device;

pub use vsock_device::VsockDevice;
