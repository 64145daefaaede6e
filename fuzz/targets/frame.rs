//! Frames between monitor and agent, in both directions: either side may have been taken over.

#![no_main]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use agent_protocol::{Hello, Reply, Request, frame};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// The most memory that decoding may take, for each byte of a frame. A list grows by doubling, and an element takes more in
/// memory than on the wire: a kernel log line of no text 3 bytes there and 40 here.
const MEMORY_PER_BYTE: usize = 64;
/// What decoding may take besides: serde reserves up to a mebibyte for a list before it has seen its elements.
const MEMORY: usize = 1 << 20;

thread_local! {
    /// Bytes in use beyond those at the last [`measure`], and their maximum.
    static IN_USE: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

/// The system's allocator, which counts.
struct Counting;

fn count(change: isize) {
    // Threads that end have no counter any more, and decode nothing.
    let _ = IN_USE.try_with(|in_use| {
        let (now, most) = in_use.get();
        in_use.set((now + change, most.max(now + change)));
    });
}

// SAFETY: everything is the system's; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    // SAFETY: the trait's own requirements, which the caller keeps.
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller vouches.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: the trait's own requirements, which the caller keeps.
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller vouches.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `work` and gives its result with the most memory that it had at a time, in bytes.
fn measure<T>(work: impl FnOnce() -> T) -> (T, usize) {
    IN_USE.set((0, 0));
    let result = work();
    (result, IN_USE.get().1.unsigned_abs())
}

fuzz_target!(|bytes: &[u8]| {
    check::<Request>(bytes);
    check::<Reply>(bytes);
    check::<Hello>(bytes);
});

fn check<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    let announced = bytes.first_chunk().map(|prefix| u32::from_le_bytes(*prefix) as usize);
    let (decoded, memory) = measure(|| frame::decode::<T>(bytes));
    match decoded {
        Ok(None) => {
            let waits = announced.is_none_or(|len| bytes.len() < frame::PREFIX_LEN + len);
            assert!(waits, "a complete frame was taken for a part of one");
            assert!(announced.is_none_or(|len| len <= frame::MAX_PAYLOAD));
            assert_eq!(memory, 0, "memory for a frame that is not there yet");
        }
        Ok(Some((message, used))) => {
            assert_eq!(Some(used), announced.map(|len| frame::PREFIX_LEN + len));
            assert!(used <= bytes.len());
            assert!(
                memory <= MEMORY + used * MEMORY_PER_BYTE,
                "{memory} bytes for a frame of {used}"
            );
            // Numbers may have been written longer than they must be, so it is not the bytes that have to be the same.
            let again = frame::encode(&message).expect("what fitted once fits again");
            assert!(again.len() <= used);
            assert_eq!(frame::decode(&again), Ok(Some((message, again.len()))));
        }
        Err(frame::FrameError::TooLong(len)) => {
            assert_eq!(announced, Some(len));
            assert!(len > frame::MAX_PAYLOAD);
            assert_eq!(memory, 0, "memory for a frame that is refused");
        }
        Err(frame::FrameError::Malformed) => {
            assert!(memory <= MEMORY + bytes.len() * MEMORY_PER_BYTE, "{memory} bytes for nothing");
        }
    }
    assert_eq!(
        frame::total_len(bytes).is_err(),
        announced.is_some_and(|len| len > frame::MAX_PAYLOAD)
    );
}
