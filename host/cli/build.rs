//! Embeds the first-party guests that `cargo xtask guests` built, so that the binary is one file.

use std::fmt::Write as _;
use std::path::PathBuf;

/// Guests that ship with the host, by file name under `target/guests`.
const GUESTS: [&str; 5] = ["llama", "chatml", "mirostat", "pii-redact", "calculator"];

fn main() {
    let manifest =
        PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let folder = manifest.join("../../target/guests");
    println!("cargo::rerun-if-changed=build.rs");
    let mut table = String::from("&[\n");
    for name in GUESTS {
        let file = folder.join(format!("{name}.wasm"));
        println!("cargo::rerun-if-changed={}", file.display());
        // A build without guests is allowed: commands that need them say how to get them.
        if let Ok(file) = file.canonicalize() {
            writeln!(table, "    (\"{name}\", include_bytes!({file:?}).as_slice()),")
                .expect("writing to a string");
        }
    }
    table.push(']');
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    std::fs::write(out.join("guests.rs"), table).expect("write the table of guests");
}
