//! The tests of the boundary once more with every guest in a cell: nobody can tell the difference.
//! `guests::host_with` looks at this file's name.
#![expect(
    clippy::duplicate_mod,
    reason = "each file brings the guests it needs, as when it is a test of its own"
)]

#[path = "capabilities.rs"]
mod capabilities;
#[path = "filters.rs"]
mod filters;
#[path = "first_party.rs"]
mod first_party;
#[path = "good.rs"]
mod good;
#[path = "hostile.rs"]
mod hostile;
#[path = "hostile_sessions.rs"]
mod hostile_sessions;
#[path = "keeping.rs"]
mod keeping;
#[path = "tools.rs"]
mod tools;

#[test]
fn these_guests_are_in_cells_indeed() {
    let host = tools::guests::host();
    let component = tools::guests::Sampler::default().component();
    let _guest = host.load_sampler("good", &component).expect("it fits");
    let ours = format!("\nPPid:\t{}\n", std::process::id());
    let is_cell = |process: &std::path::Path| {
        let read = |file: &str| std::fs::read_to_string(process.join(file)).unwrap_or_default();
        read("status").contains(&ours) && read("cmdline").contains("guest-worker\0cell\0")
    };
    let processes = std::fs::read_dir("/proc").expect("the kernel lists processes");
    assert!(processes.flatten().any(|process| is_cell(&process.path())));
}
