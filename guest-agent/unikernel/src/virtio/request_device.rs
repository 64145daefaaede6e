//! Devices with one queue that answer one request at a time: disks (virtio 1.3, section 5.2) and sources of random bytes
//! (section 5.4). They start when the host first asks for them, and are waited for without interrupts.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use agent::params::Params;
use agent_protocol::{DiskAnswer, DiskDescription, DiskRequest, MAX_DISK_BYTES, Sweep};

use super::transport::{MmioTransport, is_of_type, offered_features};
use crate::arch::mmio::Registers;
use crate::arch::virtio::VirtioSetUp;
use crate::dma::pools::{self, DISK_LEN, DISKS, RANDOM_LEN};
use crate::dma::{Lens, RequestPool, RequestQueue};

const VERSION_1: u64 = 1 << 32;

const RANDOM_TYPE: u32 = 4;

const DISK_TYPE: u32 = 2;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const HEADER_LEN: usize = 16;
const SECTOR: u32 = 512;
const NAME_LEN: usize = 20;

/// Section 5.2.6.
mod kind {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
    pub const GET_ID: u32 = 8;
    pub const DISCARD: u32 = 11;
    pub const WRITE_ZEROES: u32 = 13;
}
const STATUS_OK: u8 = 0;

/// Why a device is of no use, in words.
type Result<T> = core::result::Result<T, String>;

/// A running device.
struct RequestDevice<const LEN: usize> {
    transport: MmioTransport,
    queue: RequestQueue<LEN>,
}

impl<const LEN: usize> RequestDevice<LEN> {
    /// Starts the device of this type with this number, and takes what it offers of these feature bits.
    fn start(
        params: &Params,
        (device_type, number): (u32, usize),
        features: u64,
        pool: &'static RequestPool<LEN>,
    ) -> Result<Self> {
        let registers = params
            .devices()
            .filter_map(|device| Registers::at(device.base, device.size))
            .filter(|registers| is_of_type(registers, device_type))
            .nth(number)
            .ok_or_else(|| format!("there is no device {number} of type {device_type}"))?;
        let queue = RequestQueue::new(pool).map_err(|error| format!("queue: {error}"))?;
        let features = VERSION_1 | features & offered_features(&registers);
        let mut set_up = VirtioSetUp::new(device_type, features, &[queue.set_up()]);
        let (transport, _) = MmioTransport::start(registers, &mut set_up)
            .map_err(|refusal| format!("the device does not play along: {refusal:?}"))?;
        Ok(Self { transport, queue })
    }

    fn call(&mut self, lens: Lens) -> Result<u32> {
        let transport = &self.transport;
        self.queue
            .call(lens, || transport.notify(0))
            .map_err(|_| "the device broke its ring".into())
    }
}

/// The devices that the host has asked for so far.
#[derive(Default)]
pub struct RequestDevices {
    disks: [Option<RequestDevice<DISK_LEN>>; DISKS],
    random: Option<RequestDevice<RANDOM_LEN>>,
}

impl RequestDevices {
    /// Random bytes, at most `bytes`.
    ///
    /// # Errors
    /// Why there are none.
    pub fn random(&mut self, params: &Params, bytes: u32) -> Result<Vec<u8>> {
        if self.random.is_none() {
            let device = RequestDevice::start(params, (RANDOM_TYPE, 0), 0, &pools::RANDOM)?;
            self.random = Some(device);
        }
        let device = self.random.as_mut().ok_or("there is no such device")?;
        let answer = (bytes as usize).min(RANDOM_LEN - 64);
        let written = device.call(Lens { request: 0, answer, status: 0 })? as usize;
        // More than there was room for is the device's mistake.
        device.queue.answer().get(..written).filter(|_| written <= answer).map_or_else(
            || Err(format!("the device says that it wrote {written} bytes of {answer}")),
            |random| Ok(random.to_vec()),
        )
    }

    /// Uses disk `number`.
    ///
    /// # Errors
    /// Why it is of no use.
    pub fn disk(
        &mut self,
        params: &Params,
        number: u8,
        request: &DiskRequest,
    ) -> Result<DiskAnswer> {
        let number = usize::from(number);
        let (slot, pool) = self
            .disks
            .get_mut(number)
            .zip(pools::DISK.get(number))
            .ok_or_else(|| format!("the agent drives {DISKS} disks at most"))?;
        let device = match slot {
            Some(device) => device,
            None => {
                let wanted = F_FLUSH | F_DISCARD | F_WRITE_ZEROES;
                slot.insert(RequestDevice::start(params, (DISK_TYPE, number), wanted, pool)?)
            }
        };
        device.carry_out(request)
    }
}

impl RequestDevice<DISK_LEN> {
    fn carry_out(&mut self, request: &DiskRequest) -> Result<DiskAnswer> {
        let status = match *request {
            DiskRequest::Describe => {
                let status = self.ask(kind::GET_ID, 0, 0, NAME_LEN)?;
                if status == STATUS_OK {
                    return Ok(DiskAnswer::Description(self.description()));
                }
                status
            }
            DiskRequest::Read { sector, bytes } => {
                let len = bytes.min(MAX_DISK_BYTES) as usize;
                let status = self.ask(kind::IN, sector, 0, len)?;
                if status == STATUS_OK {
                    return Ok(DiskAnswer::Bytes(self.queue.answer()[..len].to_vec()));
                }
                status
            }
            DiskRequest::Write { sector, ref bytes } => {
                let len = bytes.len().min(MAX_DISK_BYTES as usize);
                self.payload()[..len].copy_from_slice(&bytes[..len]);
                self.ask(kind::OUT, sector, len, 0)?
            }
            DiskRequest::Flush => self.ask(kind::FLUSH, 0, 0, 0)?,
            DiskRequest::Discard { sector, sectors } => {
                self.clear(kind::DISCARD, sector, sectors, false)?
            }
            DiskRequest::WriteZeroes { sector, sectors, may_unmap } => {
                self.clear(kind::WRITE_ZEROES, sector, sectors, may_unmap)?
            }
            DiskRequest::Sweep(sweep) => self.sweep(sweep)?,
        };
        Ok(if status == STATUS_OK { DiskAnswer::Done } else { DiskAnswer::Status(status) })
    }

    /// Where the bytes behind the header are.
    fn payload(&mut self) -> &mut [u8] {
        &mut self.queue.request_mut()[HEADER_LEN..]
    }

    /// Makes a request with `payload` bytes that are in their place already, and room for `room` bytes in its answer. Returns
    /// the status.
    fn ask(&mut self, kind: u32, sector: u64, payload: usize, room: usize) -> Result<u8> {
        let header = &mut self.queue.request_mut()[..HEADER_LEN];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[4..8].fill(0);
        header[8..].copy_from_slice(&sector.to_le_bytes());
        *self.queue.status_mut() = u8::MAX;
        self.call(Lens { request: HEADER_LEN + payload, answer: room, status: 1 })?;
        Ok(*self.queue.status_mut())
    }

    fn clear(&mut self, kind: u32, sector: u64, sectors: u32, may_unmap: bool) -> Result<u8> {
        const RANGE_LEN: usize = 16;
        let range = &mut self.payload()[..RANGE_LEN];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&sectors.to_le_bytes());
        range[12..].copy_from_slice(&u32::from(may_unmap).to_le_bytes());
        self.ask(kind, 0, RANGE_LEN, 0)
    }

    /// The first status that is not [`STATUS_OK`] ends it.
    fn sweep(&mut self, sweep: Sweep) -> Result<u8> {
        let len = sweep.bytes.clamp(SECTOR, MAX_DISK_BYTES) / SECTOR * SECTOR;
        let places = (self.sectors() / u64::from(len / SECTOR)).max(1);
        for number in 0..u64::from(sweep.requests) {
            let place = number.wrapping_mul(sweep.stride.into()) % places;
            let sector = place * u64::from(len / SECTOR);
            let status = match sweep.writes {
                true => self.ask(kind::OUT, sector, len as usize, 0)?,
                false => self.ask(kind::IN, sector, 0, len as usize)?,
            };
            if status != STATUS_OK {
                return Ok(status);
            }
        }
        Ok(STATUS_OK)
    }

    fn sectors(&self) -> u64 {
        let [low, high] = [0, 4].map(|offset| u64::from(self.transport.config_word_at(offset)));
        high << 32 | low
    }

    fn description(&mut self) -> DiskDescription {
        let name = self.queue.answer()[..NAME_LEN].iter().take_while(|byte| **byte != 0);
        DiskDescription {
            name: name.map(|byte| char::from(*byte)).collect(),
            sectors: self.sectors(),
            features: self.transport.offered_features(),
        }
    }
}
