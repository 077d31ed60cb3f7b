//! What an author is told of a component: its worlds, or what is wrong with it and what to do.

mod guests;

use galerne_core::guest::{GuestError, GuestFacts, GuestLoader as _, GuestSource, World};
use guests::{Chat, Model, host};

fn inspect(component: &[u8]) -> Result<GuestFacts, GuestError> {
    host().inspect(GuestSource {
        tenant: "default",
        name: "mine",
        component,
    })
}

/// The message has all these words.
fn refused(component: &[u8], words: &[&str]) {
    let message = inspect(component).expect_err("it does not fit").to_string();
    for word in words {
        assert!(message.contains(word), "expected \"{word}\" in: {message}");
    }
}

fn text(wat: &str) -> Vec<u8> {
    wat::parse_str(wat).expect("a component in text form")
}

#[test]
fn a_component_tells_its_world() {
    let facts = inspect(&Chat::default().component()).expect("it fits");
    assert_eq!((facts.worlds, facts.imports), (vec![World::Chat], Vec::new()));
}

#[test]
fn the_first_party_guests_fit() {
    let all = [
        ("llama", World::Model),
        ("chatml", World::Chat),
        ("mirostat", World::Sampler),
        ("pii-redact", World::Filter),
        ("calculator", World::Tool),
    ];
    for (name, world) in all {
        let Some(component) = guests::built(name) else {
            return;
        };
        assert_eq!(inspect(&component).expect(name).worlds, [world]);
    }
}

#[test]
fn what_is_no_component_is_told_from_what_is_broken() {
    refused(
        b"#!/bin/sh",
        &["no WebAssembly file", "#!/bin/s", "give the .wasm file"],
    );
    refused(b"", &["no WebAssembly file"]);
    refused(b"\0asm\x0d", &["truncated", "build it again"]);
    refused(b"\0asm\x09\0\0\0", &["unknown kind"]);
    refused(
        &text("(module)"),
        &["core module, not a component", "galerne plugin build"],
    );
    let whole = Model::default().component();
    refused(
        &whole[..whole.len() / 2],
        &["truncated", "copy or build it again"],
    );
}

#[test]
fn a_wrong_world_or_version_is_named() {
    refused(
        &text("(component)"),
        &["exports nothing", "galerne:filter/filtering@0.1.0 (filter)"],
    );
    refused(
        &text(r#"(component (instance $i) (export "acme:billing/invoices@1.0.0" (instance $i)))"#),
        &["acme:billing/invoices@1.0.0", "expected one of", "(sampler)"],
    );
    refused(
        &text(r#"(component (instance $i) (export "galerne:filter/filtering@0.7.0" (instance $i)))"#),
        &[
            "galerne:filter/filtering in version 0.7.0",
            "this host speaks 0.1.0",
        ],
    );
    // The right name around the wrong functions.
    refused(
        &text(r#"(component (instance $i) (export "galerne:filter/filtering@0.1.0" (instance $i)))"#),
        &["galerne:filter/filter@0.1.0"],
    );
}

#[test]
fn wasi_is_refused_with_what_to_build_for() {
    let component = text(
        r#"(component
            (import "wasi:cli/environment@0.2.0" (instance
                (export "initial-cwd" (func (result (option string))))))
            (instance $i)
            (export "galerne:filter/filtering@0.1.0" (instance $i)))"#,
    );
    refused(
        &component,
        &["wasi:cli/environment@0.2.0", "wasm32-unknown-unknown"],
    );
}
