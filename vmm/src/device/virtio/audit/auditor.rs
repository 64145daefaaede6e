//! The auditor: which devices there are, which of their queues run, and when something is looked at.

use virtio_queue::Queue;

use super::books::{Books, Name, Place, SoFar};
use super::log::Kind;
use super::queue::{AuditedQueue, Flaw};
use super::rules::{self, EVENTS, Rules};
use crate::memory::GuestRam;

/// See the module.
#[derive(Debug)]
pub struct Auditor {
    ram: GuestRam,
    /// Queues of each device; none where the driver left one alone.
    devices: Vec<Vec<Option<AuditedQueue>>>,
    pub books: Books,
}

impl Auditor {
    /// Of a machine without devices.
    pub fn new(ram: GuestRam) -> Self {
        Self { ram, devices: Vec::new(), books: Books::default() }
    }

    /// Adds a device; returns its number.
    pub fn add_device(&mut self, device_type: u32) -> usize {
        let names = &mut self.books.names;
        let name = rules::device_name(device_type);
        let name = match names.iter().filter(|other| other.device_type == device_type).count() {
            0 => name.into(),
            before => format!("{name} {}", before + 1),
        };
        names.push(Name { name, device_type });
        self.devices.push(Vec::new());
        self.devices.len() - 1
    }

    /// A driver has set the device up.
    pub fn begin(&mut self, device: usize, indirect_agreed: bool, queues: &[Queue]) {
        self.end(device);
        let device_type = self.books.names[device].device_type;
        for (index, queue) in (0..).zip(queues) {
            let rules = Rules::of(device_type, index);
            let mut queue = AuditedQueue::new(queue, rules, indirect_agreed);
            if let Some(queue) = &mut queue
                && !self.books.note_rings(&self.ram, Place { device, queue: index }, queue)
            {
                queue.give_up();
            }
            self.devices[device].push(queue);
        }
    }

    /// The device has let go of everything.
    pub fn end(&mut self, device: usize) {
        let Self { ram, devices, books } = self;
        for mut queue in std::mem::take(&mut devices[device]).into_iter().flatten() {
            for head in queue.heads().collect::<Vec<_>>() {
                forget(ram, books, &mut queue, head);
            }
        }
        books.spans.remove_device(device);
    }

    /// Looks at what was posted on any queue of a device.
    pub fn look_at_all(&mut self, device: usize) {
        let count = self.devices[device].len();
        (0..).take(count).for_each(|queue| self.look(device, queue));
    }

    /// Looks at what was posted on a queue.
    pub fn look(&mut self, device: usize, index: u16) {
        let Self { ram, devices, books } = self;
        let Some(Some(queue)) = devices[device].get_mut(usize::from(index)) else { return };
        let place = Place { device, queue: index };
        match queue.new_entries(ram) {
            Ok(added) => {
                (0..added).for_each(|_| look_at_next(ram, books, place, queue));
                if added > 0 && queue.rules == EVENTS {
                    books.check_packed(place);
                }
            }
            Err(by) => books.found_index_jump(place, queue, by),
        }
    }

    /// A device is about to give a chain back.
    pub fn release(&mut self, device: usize, index: u16, head: u16) {
        let Self { ram, devices, books } = self;
        if let Some(Some(queue)) = devices[device].get_mut(usize::from(index)) {
            forget(ram, books, queue, head);
        }
    }

    /// Looks at all cache lines that devices have.
    pub fn check_lines(&mut self) {
        self.books.check_lines(&self.ram);
    }
}

fn look_at_next(ram: &GuestRam, books: &mut Books, place: Place, queue: &mut AuditedQueue) {
    let (head, at) = queue.next_head(ram);
    let rules = queue.rules;
    let mut so_far = SoFar::default();
    books.chains += 1;
    let followed =
        queue.follow(ram, head, |link| books.note_link(ram, place, &rules, &mut so_far, link));
    match followed {
        Ok(()) if so_far.writable < rules.min_writable => {
            let what = "has less room than the device needs";
            books.found_flaw(place, Flaw { kind: Kind::TooShort, index: head, what }, at);
        }
        Ok(()) => {}
        Err(flaw) => books.found_flaw(place, flaw, at),
    }
}

fn forget(ram: &GuestRam, books: &mut Books, queue: &mut AuditedQueue, head: u16) {
    let noted = queue.release(head).into_iter().flatten();
    noted.for_each(|start| books.forget(ram, start));
}
