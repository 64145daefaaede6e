//! Links the agent as a static ELF at fixed addresses, without the C run-time's start files.

fn main() {
    let root = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo:rerun-if-changed=link.ld");
    for argument in ["-nostartfiles", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,norelro"]
    {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{root}/link.ld");
}
