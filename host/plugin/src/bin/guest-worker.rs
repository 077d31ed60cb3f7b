//! The sub-commands of `galerne` that this crate starts, as a program of its own: for this crate's tests.

use std::process::ExitCode;
use std::time::Duration;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).and_then(|text| text.parse().ok()).unwrap_or(0);
    let done = match arguments.first().map(String::as_str) {
        Some("compile-guest") => {
            let count_fuel = arguments.get(3).is_some_and(|option| option == "--count-fuel");
            galerne_plugin::compile_guest(Duration::from_secs(number(1)), number(2), count_fuel)
                .map_err(|error| error.to_string())
        }
        Some("cell") => galerne_plugin::cell(number(1)).map_err(|error| error.to_string()),
        other => Err(format!("expected compile-guest or cell, got {other:?}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
