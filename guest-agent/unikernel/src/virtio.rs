//! The machine's virtio side: the MMIO transport, the vsock device, and devices that the host asks for.

mod request_device;
mod transport;
mod vsock_device;

pub use request_device::RequestDevices;
pub use vsock_device::VsockDevice;
