//! Intel's virtualization, emulated by Bochs: what AMD's in the lab and a software KVM here cannot show.

use serde_json::Value;

use crate::harness::{bochs, skipped};

#[test]
fn resets_are_clean_on_vt_x_and_doctors_guest_reads_the_fields_of_its_vmcs() {
    let kernel = match bochs::find() {
        Ok(kernel) => kernel,
        Err(lack) => return skipped(lack),
    };
    let done = bochs::run(
        &kernel,
        &[
            "run --resets 5 --reset-via host,i8042,cf9,acpi,triple --poison --timeout 300",
            "run --resets 1 --poison --inject fpu-kept --timeout 300",
            "doctor --json --timeout 300",
        ],
    );
    let [clean, faulty, doctor] = done.as_slice() else { unreachable!("as many as commands") };
    assert!(clean.stdout.contains("KVM on Intel VT-x"), "{}", clean.stdout);
    assert!(clean.stdout.contains("clean: 6 lives, no findings"), "{}", clean.stdout);
    assert_eq!(clean.status, "0");
    assert!(faulty.stdout.contains("fpu-kept"), "{}", faulty.stdout);
    assert_eq!(faulty.status, "1");
    let report: Value = serde_json::from_str(doctor.stdout.trim()).expect("JSON");
    let behaviours = report["behaviours"].as_array().expect("a list");
    let fields = behaviours.iter().find(|behaviour| behaviour["name"] == "vmcs-fields");
    let fields = fields.expect("nested VMX is looked at");
    let seen = &fields["observed"]["guest"]["Ok"];
    // More than a processor of today lacks; and a guest that reads everything has read nothing.
    let readable = seen["readable"].as_u64().expect("a guest has looked");
    assert!((100..200).contains(&readable), "{fields}");
    assert_eq!(seen["error"], 12, "{fields}");
    // Both judges agree: what KVM says of itself, and what its guest finds.
    let named = fields["observed"]["vmcs_enum"].as_u64().expect("KVM says so") >> 1 & 0x1ff;
    let verdict = if named == 0x19 { "affected" } else { "fixed" };
    assert_eq!(
        (&fields["verdict"], &seen["tsc_multiplier"]),
        (&verdict.into(), &(named == 0x19).into())
    );
}
