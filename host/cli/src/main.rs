//! Entry point: parses the command line and runs one command.

use std::process::ExitCode;

use clap::Parser as _;
use galerne::commands::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("galerne: {}", galerne::report(&error));
            ExitCode::FAILURE
        }
    }
}
