//! `PUT /cpu-config`: what of CPUID and of the MSRs a guest is to find changed, in the syntax of Firecracker's templates.

use serde::{Deserialize, Serialize};

use super::Refusal;
use crate::kvm::template::{Bits, CpuTemplate, CpuidChange, MsrChange, Register};

/// The most changes of a kind: KVM has room for 256 leaves.
const MOST: usize = 256;

/// `PUT /cpu-config`, as it is written.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    /// Capabilities of KVM that have to be there; with `!` those that need not.
    #[serde(default)]
    pub kvm_capabilities: Vec<String>,
    /// Leaves of CPUID.
    #[serde(default)]
    pub cpuid_modifiers: Vec<CpuidModifier>,
    /// MSRs.
    #[serde(default)]
    pub msr_modifiers: Vec<MsrModifier>,
}

/// One leaf of CPUID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidModifier {
    leaf: String,
    subleaf: String,
    flags: u32,
    modifiers: Vec<RegisterModifier>,
}

/// A register of a leaf.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegisterModifier {
    register: RegisterName,
    bitmap: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum RegisterName {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// One MSR.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MsrModifier {
    addr: String,
    bitmap: String,
}

impl CpuConfig {
    /// The same as numbers.
    ///
    /// # Errors
    /// [`Refusal`] that names what is no number or no bitmap.
    pub fn template(&self) -> Result<CpuTemplate, Refusal> {
        let lengths =
            [self.kvm_capabilities.len(), self.cpuid_modifiers.len(), self.msr_modifiers.len()];
        if lengths.into_iter().any(|length| length > MOST) {
            return Err(Refusal::new(format!("more than {MOST} changes of one kind")));
        }
        let mut template = CpuTemplate::default();
        for capability in &self.kvm_capabilities {
            match capability.strip_prefix('!') {
                Some(number) => {
                    template.dispensable.push(parse_number(number, "kvm_capabilities")?);
                }
                None => template.demanded.push(parse_number(capability, "kvm_capabilities")?),
            }
        }
        for CpuidModifier { leaf, subleaf, modifiers, .. } in &self.cpuid_modifiers {
            for RegisterModifier { register, bitmap } in modifiers {
                let (keep, value) = parse_bitmap(bitmap, 32)?;
                template.cpuid.push(CpuidChange {
                    leaf: parse_number(leaf, "leaf")?,
                    subleaf: parse_number(subleaf, "subleaf")?,
                    register: match register {
                        RegisterName::Eax => Register::Eax,
                        RegisterName::Ebx => Register::Ebx,
                        RegisterName::Ecx => Register::Ecx,
                        RegisterName::Edx => Register::Edx,
                    },
                    bits: Bits { keep: keep as u32, value: value as u32 },
                });
            }
        }
        for MsrModifier { addr, bitmap } in &self.msr_modifiers {
            let (keep, value) = parse_bitmap(bitmap, 64)?;
            let bits = Bits { keep, value };
            template.msrs.push(MsrChange { index: parse_number(addr, "addr")?, bits });
        }
        Ok(template)
    }
}

/// A number as Firecracker writes it: `0x` and hexadecimal, `0b` and binary, or decimal.
fn parse_number(text: &str, field: &str) -> Result<u32, Refusal> {
    let digits = |text: &str, radix| {
        // No sign: from_str_radix would take one.
        let plain = text.chars().all(|c| c.is_digit(radix));
        plain.then(|| u32::from_str_radix(text, radix).ok()).flatten()
    };
    let number = match (text.strip_prefix("0x"), text.strip_prefix("0b")) {
        (Some(text), _) => digits(text, 16),
        (_, Some(text)) => digits(text, 2),
        _ => digits(text, 10),
    };
    number.ok_or_else(|| Refusal::new(format!("{field}: {text:?} is no number of 32 bits")))
}

/// `0b` and up to `width` digits: `0` and `1` set a bit to that, `x` leaves it as it is, `_` is only for the eye. What is not
/// written stays as it is. Returns which bits stay and what the others become.
fn parse_bitmap(text: &str, width: usize) -> Result<(u64, u64), Refusal> {
    let wrong =
        || Refusal::new(format!("bitmap: {text:?} is not 0b and up to {width} digits 0, 1 or x"));
    let digits = text.strip_prefix("0b").ok_or_else(wrong)?;
    let digits: Vec<char> = digits.chars().filter(|digit| *digit != '_').collect();
    if digits.is_empty() || digits.len() > width {
        return Err(wrong());
    }
    let (mut keep, mut value) = (u64::MAX, 0);
    for digit in digits {
        let (stays, is_set) = match digit {
            '0' => (0, 0),
            '1' => (0, 1),
            'x' => (1, 0),
            _ => return Err(wrong()),
        };
        keep = keep << 1 | stays;
        value = value << 1 | is_set;
    }
    Ok((keep, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_notations() {
        let check = |text: &str, expected: Option<u32>| {
            assert_eq!(parse_number(text, "leaf").ok(), expected, "{text:?}");
        };
        check("0x8000001d", Some(0x8000_001d));
        check("0b101", Some(5));
        check("17", Some(17));
        for wrong in ["", "0x", "0x1_0000_0000", "0x100000000", "-1", "+1", "0x+1", "1 ", "ten"] {
            check(wrong, None);
        }
    }

    #[test]
    fn bitmaps_say_what_stays_and_what_becomes_of_the_rest() {
        let check = |text: &str, width, expected: Option<(u64, u64)>| {
            assert_eq!(parse_bitmap(text, width).ok(), expected, "{text:?}");
        };
        check("0b1", 32, Some((!1, 1)));
        check("0b0x1", 32, Some((!0b101, 1)));
        check("0bx", 32, Some((!0, 0)));
        check("0b1_0", 32, Some((!0b11, 0b10)));
        check(&format!("0b{}", "1".repeat(64)), 64, Some((0, !0)));
        check(&format!("0b{}", "1".repeat(33)), 32, None);
        for wrong in ["", "0b", "0b_", "1", "0b2", "0bX", "0x1"] {
            check(wrong, 32, None);
        }
    }
}
