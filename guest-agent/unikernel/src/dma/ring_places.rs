//! Where a queue's rings lie. `VirtQueue::new` writes that into a device register by register; here it is written down
//! instead, so that the transport can tell the device everything at once.

use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr, Result};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::arch::virtio::QueueSetUp;

/// What was written down.
#[derive(Default)]
pub(super) struct RingPlaces(pub QueueSetUp);

/// A transport to a device with queues of any size, none of them set up: all that `VirtQueue::new` asks for.
impl Transport for RingPlaces {
    fn queue_used(&mut self, _: u16) -> bool {
        false
    }

    fn max_queue_size(&mut self, _: u16) -> u32 {
        u32::MAX
    }

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        _: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        let [descriptors, driver_area, device_area] = [descriptors, driver_area, device_area]
            .map(|place| u32::try_from(place).expect("the agent's memory lies below 4 GiB"));
        self.0 = QueueSetUp { size, descriptors, driver_area, device_area };
    }

    fn device_type(&self) -> DeviceType {
        DeviceType::Socket
    }

    fn read_device_features(&mut self) -> u64 {
        0
    }

    fn write_driver_features(&mut self, _: u64) {}

    fn notify(&mut self, _: u16) {}

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::empty()
    }

    fn set_status(&mut self, _: DeviceStatus) {}

    fn set_guest_page_size(&mut self, _: u32) {}

    fn queue_unset(&mut self, _: u16) {}

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::empty()
    }

    fn read_config_generation(&self) -> u32 {
        0
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, _: usize) -> Result<T> {
        Err(Error::Unsupported)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, _: usize, _: T) -> Result<()> {
        Err(Error::Unsupported)
    }
}
