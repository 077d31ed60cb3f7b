//! The galerne binary's inside: configuration, wiring of the crates, one file per command.
//! The only place that reads the environment and talks to a terminal.
#![expect(clippy::print_stdout, reason = "this crate is the command line")]

pub mod commands;
pub mod config;
pub mod guests;
pub mod load;
