//! The galerne binary's inside: configuration, wiring of the crates, one file per command.
//! The only place that reads the environment and talks to a terminal.
#![expect(clippy::print_stdout, reason = "this crate is the command line")]

pub mod admin_token;
pub mod capabilities;
pub mod commands;
pub mod config;
pub mod guests;
pub mod kernels;
pub mod load;
pub mod scaffold;
pub mod tiny_model;

/// An error with its causes on one line, each said once: many errors already quote their cause.
#[must_use]
pub fn report(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}
