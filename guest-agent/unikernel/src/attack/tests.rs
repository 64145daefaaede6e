use super::*;
use crate::vsock::HEADER_LEN;

use alloc::vec::Vec;
use core::ops::Range;

/// A device that accepts everything, and remembers it.
struct Recorder {
    accesses: Vec<(u32, Option<u32>)>,
    /// Writes while a driver ran and some queue had chains.
    in_flight: Vec<(u32, u32)>,
    status: u32,
    arena: Vec<u8>,
}

impl Recorder {
    fn new() -> Self {
        let arena = alloc::vec![0; ARENA_LEN as usize];
        Self { accesses: Vec::new(), in_flight: Vec::new(), status: 0, arena }
    }

    fn has_chains(&self, queue: u32) -> bool {
        self.arena[(queue * QUEUE_BYTES + AVAILABLE + 2) as usize..][..2] != [0; 2]
    }
}

const FREE: Range<u64> = 0x100_0000..0x800_0000;

impl Victim for Recorder {
    fn read(&mut self, offset: u32) -> u32 {
        self.accesses.push((offset, None));
        match offset {
            0x034 => 256,
            0x100 => 3,
            _ => u32::MAX,
        }
    }

    fn write(&mut self, offset: u32, value: u32) {
        self.accesses.push((offset, Some(value)));
        if self.status & 4 != 0 && (0..QUEUES).any(|queue| self.has_chains(queue)) {
            self.in_flight.push((offset, value));
        }
        if offset == registers::STATUS {
            self.status = value;
        }
    }

    fn put(&mut self, at: u32, bytes: &[u8]) {
        self.arena[at as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn arena(&self) -> u64 {
        0x50_0000
    }

    fn free_ram(&self) -> Range<u64> {
        FREE
    }
}

fn recorded(seed: u64, life: u32) -> Recorder {
    let mut victim = Recorder::new();
    attack(&mut victim, &mut Random::new(seed, life), 300);
    victim
}

#[test]
fn an_attack_is_the_same_for_the_same_seed_and_life_alone() {
    let (first, again) = (recorded(7, 1), recorded(7, 1));
    assert!(first.accesses == again.accesses && first.arena == again.arena);
    for other in [recorded(8, 1), recorded(7, 2)] {
        assert!(first.accesses != other.accesses);
    }
}

#[test]
fn an_attack_writes_every_register_that_matters_and_none_beyond() {
    let accesses: Vec<_> = (0..20).flat_map(|seed| recorded(seed, 1).accesses).collect();
    for register in [0x14, 0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x70, 0x80, 0x84, 0x90, 0xa0, 0xa4] {
        assert!(accesses.iter().any(|(offset, value)| *offset == register && value.is_some()));
    }
    assert!(accesses.iter().all(|(offset, _)| *offset < 0x1000 && offset % 4 == 0));
    let unknown_queue = |(offset, value): &(u32, Option<u32>)| *offset == 0x50 && *value > Some(3);
    assert!(accesses.iter().any(unknown_queue));
}

#[test]
fn rings_move_features_change_and_queues_go_with_chains_in_flight() {
    const FEATURES: u32 = 0x20;
    const READY: u32 = 0x44;
    const RINGS: [u32; 3] = [0x80, 0x90, 0xa0];
    let mut random = Random::new(1, 1);
    let mut seen = [0; 6];
    for _ in 0..300 {
        let mut victim = Recorder::new();
        change_in_flight(&mut victim, &mut random);
        let made = |offset, of: fn(u32) -> bool| {
            victim.in_flight.iter().any(|&(at, value)| at == offset && of(value))
        };
        seen[0] += u32::from(made(READY, |value| value == 0));
        seen[1] += u32::from(made(FEATURES, |_| true));
        // Taken back, moved, and used again.
        let moves = victim.in_flight.windows(8).any(|writes| {
            let at = |step: usize| writes[step].0;
            let places = (0..6).all(|half| at(half + 1) == RINGS[half / 2] + 4 * (half as u32 % 2));
            places && writes[0] == (READY, 0) && writes[7] == (READY, 1)
        });
        seen[2] += u32::from(moves);
        let queues = [0, 1, 2].map(|queue| victim.has_chains(queue));
        seen[3..].iter_mut().zip(queues).for_each(|(seen, has)| *seen += u32::from(has));
    }
    assert!(seen.iter().all(|&times| times > 50), "{seen:?}");
}

#[test]
fn what_devices_are_told_to_write_to_is_nobodys() {
    let victim = recorded(1, 1);
    let mut random = Random::new(1, 1);
    for _ in 0..10_000 {
        let address = address(&victim, &mut random);
        let arena = victim.arena()..victim.arena() + u64::from(ARENA_LEN);
        assert!(arena.contains(&address) || address >= FREE.start, "{address:#x}");
    }
}

#[test]
fn noise_is_of_no_connection_of_the_agents_and_leaves_it_its_turn() {
    let orders = Orders { seed: 3, packets: 5, ..Orders::default() };
    let mut noise = orders.noise(1, 3).unwrap();
    let mut buffer = [0; 4096];
    assert_eq!(
        noise.among(&mut buffer, |_| None),
        None,
        "without good packets there are no bad ones"
    );
    for _ in 0..1000 {
        assert_eq!(noise.among(&mut buffer, |_| Some(7)), Some(7));
        for _ in 0..5 {
            let len = noise.among(&mut buffer, |_| Some(7)).unwrap();
            assert!((HEADER_LEN..HEADER_LEN + 128).contains(&len));
            let port = u32::from_le_bytes(buffer[16..20].try_into().unwrap());
            assert!(port < 700, "{port}");
            // Only what answers these is no sign of a life before.
            assert!(orders.ask_for_packets_to(port, 1), "{port}");
            assert!(!orders.ask_for_packets_to(port, 2) && !orders.ask_for_packets_to(port, 0));
        }
    }
    assert!(!orders.ask_for_packets_to(5005, 1) && !orders.ask_for_packets_to(700, 1));
    assert!((0..1000).all(|port| !Orders::default().ask_for_packets_to(port, 1)));
}
