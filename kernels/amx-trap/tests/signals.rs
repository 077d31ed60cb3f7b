//! Signals that are none of its business, and instructions that hardware would refuse, end the process: seen from outside,
//! in a child that runs one of the ignored tests.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![expect(unsafe_code, reason = "the tests are about single instructions")]

use std::arch::asm;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Output};

fn child(test: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().expect("this program's path"));
    command.args(["--ignored", "--exact", test, "--nocapture"]);
    command.output().expect("this program runs again")
}

#[test]
fn an_unknown_instruction_still_ends_the_process() {
    let output = child("executes_ud2");
    assert_eq!(output.status.signal(), Some(libc::SIGILL), "{output:?}");
}

#[test]
#[ignore = "run by the test above: ends the process"]
fn executes_ud2() {
    assert!(galerne_amx_trap::install());
    // SAFETY: it never returns.
    unsafe { asm!("ud2", options(noreturn)) };
}

#[test]
fn a_tile_that_is_not_configured_ends_the_process_with_the_reason() {
    let output = child("zeroes_before_it_configures");
    assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        text.contains("amx-trap: tile 5: expected a configured tile"),
        "{text}"
    );
}

#[test]
#[ignore = "run by the test above: ends the process"]
fn zeroes_before_it_configures() {
    assert!(galerne_amx_trap::install());
    // SAFETY: changes a tile only, which nobody else uses.
    unsafe { asm!("tilezero tmm5", out("tmm5") _, options(nostack)) };
}
