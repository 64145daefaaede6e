//! What the process's exit status says.

/// The machine is clean, or a guest of the user's ended by turning the machine off.
pub const CLEAN: u8 = 0;
/// The verdict has findings.
pub const FINDINGS: u8 = 1;
/// Wrong usage, or the host failed.
pub const USAGE_OR_HOST: u8 = 2;
/// A guest of the user's asked for a reset beyond `--resets`.
pub const GUEST_RESET: u8 = 3;
/// A guest of the user's died of a triple fault beyond `--resets`.
pub const GUEST_TRIPLE_FAULT: u8 = 4;
/// KVM cannot run the guest any further.
pub const GUEST_STUCK: u8 = 5;
/// SIGINT, SIGTERM or SIGHUP, as shells give it for the first.
pub const INTERRUPTED: u8 = 130;
