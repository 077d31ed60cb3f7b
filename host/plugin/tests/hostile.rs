//! Guests that misbehave: each is contained in bounded time, and the host serves another guest afterwards.

mod guests;

use std::time::{Duration, Instant};

use galerne_core::chat::{ChatError, ChatOptions};
use galerne_core::guest::GuestError;
use galerne_core::limits::{GraphLimits, GuestLimits};
use galerne_core::validate::validate;
use galerne_core::weights::WeightIndex;
use galerne_plugin::PluginOptions;
use guests::expect::{FOREVER, is_deadline, is_limit, is_link, is_trap, serves};
use guests::{Chat, Model, host, host_with, words};

/// What one misbehaving `build` gives; the host must serve a good guest afterwards.
fn build(model: &Model<'_>) -> GuestError {
    let host = host();
    let started = Instant::now();
    let guest = host
        .load_model("evil", &model.component())
        .expect("it fits its world");
    let error = guest.build("{}").expect_err("it misbehaves");
    assert!(
        started.elapsed() < Duration::from_secs(5),
        "contained only after {:?}",
        started.elapsed()
    );
    serves(&host);
    error
}

fn body(build: &str) -> Model<'_> {
    Model {
        build,
        ..Model::default()
    }
}

#[test]
fn build_that_loops_forever() {
    is_deadline(&build(&body(FOREVER)), "build", 400);
}

#[test]
fn a_start_function_that_loops_forever() {
    let more = "(func $forever (loop $again (br $again))) (start $forever)";
    let host = host();
    let error = host
        .load_model(
            "evil",
            &Model {
                more,
                ..Model::default()
            }
            .component(),
        )
        .err()
        .expect("it never starts");
    is_deadline(&error, "load", 300);
    serves(&host);
}

#[test]
fn an_allocator_that_loops_forever() {
    let more = r#"(func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (loop $a (br $a)) unreachable)"#;
    is_deadline(
        &build(&Model {
            more,
            common: false,
            ..Model::default()
        }),
        "build",
        400,
    );
}

#[test]
fn an_allocator_that_returns_an_address_outside_memory() {
    let more = r#"(func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const -8))"#;
    is_trap(
        &build(&Model {
            more,
            common: false,
            ..Model::default()
        }),
        "beyond end of memory",
    );
}

#[test]
fn a_clean_up_that_loops_forever() {
    let more = format!(
        r#"(func (export "cabi_post_galerne:model/architecture@0.1.0#build") (param i32) (loop $a (br $a)))
           (data (i32.const 64) "{}")"#,
        words(&[0, 512, 0, 0, 16]),
    );
    is_deadline(
        &build(&Model {
            build: "(i32.const 64)",
            more: &more,
            ..Model::default()
        }),
        "build",
        400,
    );
}

#[test]
fn build_that_traps() {
    is_trap(&build(&body("unreachable")), "unreachable");
}

#[test]
fn build_that_recurses_without_end() {
    let model = Model {
        build: "(call $deeper (i32.const 0))",
        more: "(func $deeper (param i32) (result i32) (i32.add (call $deeper (local.get 0)) (i32.const 1)))",
        ..Model::default()
    };
    is_trap(&build(&model), "call stack exhausted");
}

#[test]
fn build_that_grows_memory_to_4_gib_and_traps_when_refused() {
    let grow =
        "(loop $again (br_if $again (i32.ne (memory.grow (i32.const 64)) (i32.const -1)))) unreachable";
    is_limit(&build(&body(grow)), "memory of at most 67108864 bytes");
}

#[test]
fn build_that_asks_for_4_gib_at_once() {
    let grow = "(drop (memory.grow (i32.const 65535))) unreachable";
    is_limit(
        &build(&body(grow)),
        "memory of at most 67108864 bytes, wanted 4294967296",
    );
}

#[test]
fn memory_of_4_gib_from_the_start() {
    let model = Model {
        memory: r#"(memory (export "memory") 65536)"#,
        ..Model::default()
    };
    let host = host();
    let error = host
        .load_model("evil", &model.component())
        .err()
        .expect("too large");
    is_link(&error, &["4294967296", "exceeds the limit"]);
    serves(&host);
}

#[test]
fn a_refused_growth_does_not_explain_a_later_trap() {
    let host = host();
    let push = "(if (i32.load8_u (i32.const 400)) (then unreachable))
        (i32.store8 (i32.const 400) (i32.const 1)) (drop (memory.grow (i32.const 65535))) (i32.const 280)";
    let guest = host
        .load_chat(
            "evil",
            &Chat {
                push,
                ..Chat::default()
            }
            .component(),
        )
        .expect("it fits");
    let mut parser = guest.parser(&ChatOptions::default()).expect("a parser");
    assert_eq!(parser.push("a"), Ok(vec![]), "a guest may ask for memory in vain");
    match parser.push("b") {
        Err(ChatError::Guest(error)) => is_trap(&error, "unreachable"),
        other => panic!("expected a trap, got {other:?}"),
    }
}

#[test]
fn a_table_of_ten_million_elements() {
    let host = host();
    let model = Model {
        more: "(table 10000000 funcref)",
        ..Model::default()
    };
    let error = host
        .load_model("evil", &model.component())
        .err()
        .expect("too large");
    is_link(&error, &["table", "exceeds the limit"]);
    serves(&host);
}

#[test]
fn a_table_that_grows_without_end() {
    let model = Model {
        more: "(table $t 1 funcref)",
        build: "(loop $again
            (br_if $again (i32.ne (table.grow $t (ref.null func) (i32.const 1000)) (i32.const -1)))) unreachable",
        ..Model::default()
    };
    is_limit(&build(&model), "tables of at most 10000 elements");
}

/// A result at 64 that says `ok` with this list of nodes; `nodes` lie at 512.
fn with_nodes(pointer: u32, count: u32, nodes: &[u32]) -> GuestError {
    let more = format!(
        r#"(data (i32.const 64) "{}") (data (i32.const 512) "{}")"#,
        words(&[0, pointer, count, 0, 16]),
        words(nodes)
    );
    build(&Model {
        build: "(i32.const 64)",
        more: &more,
        ..Model::default()
    })
}

#[test]
fn a_list_of_a_billion_nodes() {
    is_trap(&with_nodes(512, 1 << 30, &[]), "out of bounds");
}

#[test]
fn a_list_longer_than_memory() {
    is_trap(&with_nodes(512, 1_000, &[]), "out of bounds");
}

#[test]
fn a_list_at_an_unaligned_address() {
    is_trap(&with_nodes(513, 1, &[]), "not aligned");
}

#[test]
fn an_op_that_does_not_exist() {
    is_trap(&with_nodes(512, 1, &[200]), "discriminant");
}

#[test]
fn an_enum_case_that_does_not_exist() {
    // activation(x = 0, function = 77)
    is_trap(&with_nodes(512, 1, &[9, 0, 77]), "discriminant");
}

#[test]
fn a_weight_name_that_is_not_utf_8() {
    // logits(x = 0, weight = two bytes at 528)
    is_trap(&with_nodes(512, 1, &[19, 0, 528, 2, 0xffff]), "utf-8");
}

#[test]
fn a_weight_name_outside_memory() {
    is_trap(&with_nodes(512, 1, &[19, 0, 0xffff_fff0, 8]), "out of bounds");
}

#[test]
fn a_result_outside_memory() {
    is_trap(&build(&body("(i32.const -16)")), "out of bounds");
}

#[test]
fn a_rope_whose_width_and_frequencies_disagree() {
    // rope(x = 0, inv-freq = 1 at 528, rotated-width = 8, half, 1.0)
    let error = with_nodes(512, 1, &[4, 0, 560, 1, 8, 0, 1.0f32.to_bits()]);
    assert!(
        matches!(&error, GuestError::Refused { message, .. } if message.contains("rope at node 0")),
        "{error}"
    );
}

#[test]
fn strings_that_share_memory_to_fill_the_host() {
    // 4000 names of 32 KiB each, all the same bytes: 128 MiB of host memory out of 64 KiB.
    let guest = r#"(module (memory (export "memory") 2)
        (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32) (i32.const 0))
        (func (export "galerne:model/architecture@0.1.0#build") (param i32 i32) (result i32) unreachable)
        (func (export "galerne:model/architecture@0.1.0#model-types") (result i32)
            (local $i i32)
            (loop $again
                (i32.store (i32.add (i32.const 65536) (i32.mul (local.get $i) (i32.const 8))) (i32.const 16))
                (i32.store (i32.add (i32.const 65540) (i32.mul (local.get $i) (i32.const 8))) (i32.const 32768))
                (local.set $i (i32.add (local.get $i) (i32.const 1)))
                (br_if $again (i32.lt_u (local.get $i) (i32.const 4000))))
            (i32.store (i32.const 0) (i32.const 65536))
            (i32.store (i32.const 4) (i32.const 4000))
            (i32.const 0)))"#;
    let host = host();
    let guest = host
        .load_model("evil", &guests::component("model", "model", guest))
        .expect("it fits");
    let error = guest.model_types().expect_err("too much");
    is_limit(&error, "at most 16777216 bytes");
    serves(&host);
}

#[test]
fn a_graph_that_reads_ahead_is_stopped_at_the_gate() {
    // add(a = 1, b = 1), l2-normalise(0)
    let more = format!(
        r#"(data (i32.const 64) "{}") (data (i32.const 512) "{}") (data (i32.const 584) "{}")"#,
        words(&[0, 512, 2, 1, 16]),
        words(&[6, 1, 1]),
        words(&[17, 0]),
    );
    let host = host();
    let guest = Model {
        build: "(i32.const 64)",
        more: &more,
        ..Model::default()
    };
    let guest = host.load_model("evil", &guest.component()).expect("it fits");
    let graph = guest.build("{}").expect("plain data");
    let error = validate(graph, &WeightIndex::default(), &GraphLimits::default()).expect_err("a cycle");
    let text = error.to_string();
    assert!(text.contains("node 0") && text.contains("before"), "{text}");
    serves(&host);
}

#[test]
fn a_guest_that_imports_something() {
    let host = host();
    let component = wat::parse_str(
        r#"(component (import "wasi:cli/environment@0.2.0" (instance
            (export "initial-cwd" (func (result (option string)))))))"#,
    )
    .expect("valid text");
    let error = host.load_model("evil", &component).err().expect("no imports");
    is_link(&error, &["wasi:cli/environment@0.2.0", "offers no imports"]);
    assert!(error.to_string().contains("galerne:model/model@0.1.0"), "{error}");
    serves(&host);
}

#[test]
fn a_guest_that_exports_nothing() {
    let host = host();
    let component = wat::parse_str("(component)").expect("valid text");
    is_link(
        &host.load_model("evil", &component).err().expect("no export"),
        &["galerne:model/architecture@0.1.0"],
    );
    is_link(
        &host.load_chat("evil", &component).err().expect("no export"),
        &["galerne:chat/format@0.1.0"],
    );
    is_link(
        &host.load_sampler("evil", &component).err().expect("no export"),
        &["galerne:sampling/sampling@0.1.0"],
    );
    serves(&host);
}

#[test]
fn a_guest_of_another_world() {
    let host = host();
    let error = host
        .load_model("evil", &Chat::default().component())
        .err()
        .expect("a chat format");
    is_link(&error, &["galerne:model/architecture@0.1.0"]);
}

#[test]
fn exports_of_other_types() {
    let host = host();
    let component = wat::parse_str(
        r#"(component
            (core module $m (func (export "f") (result i32) (i32.const 0)))
            (core instance $i (instantiate $m))
            (func $f (result u32) (canon lift (core func $i "f")))
            (instance $a (export "build" (func $f)) (export "model-types" (func $f)))
            (export "galerne:model/architecture@0.1.0" (instance $a)))"#,
    )
    .expect("valid text");
    is_link(
        &host.load_model("evil", &component).err().expect("wrong types"),
        &["another type", "expected `list` found `u32`"],
    );
    serves(&host);
}

#[test]
fn bytes_that_are_no_component() {
    let host = host();
    for bytes in [
        &b""[..],
        b"hello",
        b"\0asm\x01\0\0\0",
        b"\0asm\x0d\0\x01\0\xff\xff",
        b"(component)",
    ] {
        let error = host.load_model("evil", bytes).err().expect("no component");
        assert!(matches!(error, GuestError::Link { .. }), "{error}");
    }
    serves(&host);
}

#[test]
fn a_component_larger_than_allowed() {
    let limits = GuestLimits {
        component_bytes_max: 1_000,
        ..GuestLimits::default()
    };
    let host = host_with(&PluginOptions {
        limits,
        ..PluginOptions::default()
    });
    is_limit(
        &host.load_model("evil", &[0; 1_001]).err().expect("too large"),
        "at most 1000 bytes, got 1001",
    );
}

#[test]
fn a_component_of_very_many_instances() {
    let host = host();
    let instances: String = (0..100)
        .map(|i| format!("(core instance $i{i} (instantiate $m))"))
        .collect();
    let component =
        wat::parse_str(format!("(component (core module $m (memory 1)) {instances})")).expect("valid");
    let error = host.load_model("evil", &component).err().expect("too many");
    is_link(&error, &["100"]);
    serves(&host);
}

#[test]
fn a_component_of_very_many_memories() {
    let host = host();
    let instances: String = (0..5)
        .map(|i| format!("(core instance $i{i} (instantiate $m))"))
        .collect();
    let component =
        wat::parse_str(format!("(component (core module $m (memory 1)) {instances})")).expect("valid");
    let error = host.load_model("evil", &component).err().expect("too many");
    is_link(&error, &["5 Wasm linear memories", "maximum of 4"]);
    serves(&host);
}
