//! Guest RAM.

/// Guest RAM as the devices see it. Cheap to clone: the clones share one mapping.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;
