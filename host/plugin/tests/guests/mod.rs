//! Guests written in WebAssembly text, so that these tests need no wasm toolchain. Knows no test.
#![allow(dead_code, reason = "each test binary uses some of these")]

pub(crate) mod capability;
pub(crate) mod expect;
pub(crate) mod filter;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use galerne_core::guest::{Answer, GuestError, SamplerSession, Waker};
use galerne_core::limits::GuestLimits;
use galerne_plugin::{Isolation, PluginHost, PluginOptions};
use wit_component::{ComponentEncoder, StringEncoding, embed_component_metadata};
use wit_parser::{PackageId, Resolve, WorldId};

/// The program whose sub-commands compile and run guests.
pub(crate) fn worker() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_guest-worker"))
}

/// A host with short deadlines and few instances.
pub(crate) fn host() -> PluginHost {
    host_with(&PluginOptions::default())
}

/// A host with short deadlines and few instances, and otherwise these options.
pub(crate) fn host_with(options: &PluginOptions) -> PluginHost {
    let limits = GuestLimits {
        step_deadline: Duration::from_millis(200),
        request_deadline: Duration::from_millis(300),
        build_deadline: Duration::from_millis(400),
        ..options.limits
    };
    let instances_max = options.instances_max.min(16);
    // The tests of `in_cells.rs` are those of the other files, under the other isolation.
    let in_cells = env!("CARGO_CRATE_NAME") == "in_cells";
    let isolation = if in_cells {
        Isolation::Process
    } else {
        options.isolation
    };
    let host = PluginHost::new(PluginOptions {
        limits,
        instances_max,
        isolation,
        worker: options.worker.clone().or_else(|| in_cells.then(worker)),
        ..options.clone()
    });
    host.expect("a plugin host").for_tenant("tests")
}

/// A component of the world `world` of `wit/<package>/0.1.0` around a core module in text form.
pub(crate) fn component(package: &str, world: &str, module: &str) -> Vec<u8> {
    let mut resolve = Resolve::default();
    let package = contract(&mut resolve, package);
    let world = resolve
        .select_world(&[package], Some(world))
        .expect("the world is there");
    encoded(&resolve, world, module)
}

/// The same for a module that also imports a capability.
pub(crate) fn component_with(package: &str, world: &str, capability: &str, module: &str) -> Vec<u8> {
    let mut resolve = Resolve::default();
    for package in [package, capability] {
        contract(&mut resolve, package);
    }
    let both = format!(
        "package tests:guest; world guest {{ include galerne:{package}/{world}@0.1.0; \
         include galerne:{capability}/imports@0.1.0; }}"
    );
    let package = resolve.push_str("guest.wit", &both).expect("it parses");
    let world = resolve
        .select_world(&[package], None)
        .expect("the world is there");
    encoded(&resolve, world, module)
}

fn contract(resolve: &mut Resolve, package: &str) -> PackageId {
    let wit = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../wit")
        .join(package)
        .join("0.1.0");
    let (package, _) = resolve.push_path(wit).expect("the contract parses");
    package
}

fn encoded(resolve: &Resolve, world: WorldId, module: &str) -> Vec<u8> {
    let mut module = wat::parse_str(module).unwrap_or_else(|error| panic!("{error}\n{module}"));
    embed_component_metadata(&mut module, resolve, world, StringEncoding::UTF8).expect("metadata");
    let mut encoder = ComponentEncoder::default()
        .module(&module)
        .expect("a core module of this world");
    encoder.encode().expect("a component")
}

/// The component of a guest of `plugins/`, if `cargo xtask guests` has built it; else says that its test is skipped.
pub(crate) fn built(name: &str) -> Option<Vec<u8>> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../target/guests")
        .join(name)
        .with_extension("wasm");
    let component = std::fs::read(&file).ok();
    if component.is_none() {
        eprintln!(
            "SKIPPED: no guest at {}; `cargo xtask guests` builds it",
            file.display()
        );
    }
    component
}

/// What every guest has: one page of memory and an allocator that starts anew when `$next` is reset.
/// Addresses below 32768 are the test's.
const COMMON: &str = r#"
    (global $next (mut i32) (i32.const 32768))
    (func $reset (global.set $next (i32.const 32768)))
    (func (export "cabi_realloc") (param i32 i32 i32 i32) (result i32)
        (local $at i32)
        (local.set $at (i32.and (i32.add (global.get $next) (i32.const 7)) (i32.const -8)))
        (global.set $next (i32.add (local.get $at) (local.get 3)))
        (local.get $at))
"#;

/// What a test changes in a model guest.
pub(crate) struct Model<'a> {
    /// The memory, with its export.
    pub(crate) memory: &'a str,
    /// The body of `build`, which returns the address of a `result<graph, error>`.
    pub(crate) build: &'a str,
    /// More fields of the module.
    pub(crate) more: &'a str,
    /// Whether the allocator is the common one; else `more` has it.
    pub(crate) common: bool,
}

impl Default for Model<'_> {
    fn default() -> Self {
        Self {
            memory: "(memory (export \"memory\") 1)",
            build: "unreachable",
            more: "",
            common: true,
        }
    }
}

impl Model<'_> {
    /// The component. Its `model-types` gives "hostile".
    pub(crate) fn component(&self) -> Vec<u8> {
        let Self {
            memory,
            build,
            more,
            common,
        } = self;
        let common = if *common { COMMON } else { "" };
        let module = format!(
            r#"(module {memory} {common} {more}
                (func (export "galerne:model/architecture@0.1.0#model-types") (result i32) (i32.const 8))
                (func (export "galerne:model/architecture@0.1.0#build") (param i32 i32) (result i32) {build})
                (data (i32.const 8) "{list}{string}")
                (data (i32.const 32) "hostile"))"#,
            list = words(&[16, 1]),
            string = words(&[32, 7]),
        );
        component("model", "model", &module)
    }
}

/// Words as they lie in memory, for a data segment.
pub(crate) fn words(words: &[u32]) -> String {
    bytes(
        &words
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect::<Vec<_>>(),
    )
}

/// Bytes for a data segment.
pub(crate) fn bytes(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("\\{byte:02x}")).collect()
}

/// What a test changes in a sampling guest.
pub(crate) struct Sampler<'a> {
    /// Body of `create`; leaves the address of a `result<session, string>`.
    pub(crate) create: &'a str,
    /// Body of `plan`; leaves the address of a plan.
    pub(crate) plan: &'a str,
    /// Body of `choose`; leaves an index.
    pub(crate) choose: &'a str,
}

impl Default for Sampler<'_> {
    fn default() -> Self {
        Self {
            create: "(i32.store8 (i32.const 64) (i32.const 0))
                (i32.store (i32.const 68) (call $new (i32.const 7)))
                (i32.const 64)",
            // The temperature is the position; as many candidates as tokens were accepted; the bias is empty.
            plan: "(f32.store (i32.const 148) (f32.convert_i32_u (local.get 1)))
                (i32.store (i32.const 176) (local.get 3))
                (call $reset)
                (i32.const 128)",
            // The last.
            choose: "(call $reset) (i32.sub (local.get 2) (i32.const 1))",
        }
    }
}

impl Sampler<'_> {
    /// The component.
    pub(crate) fn component(&self) -> Vec<u8> {
        let Self { create, plan, choose } = self;
        let interface = "galerne:sampling/sampling@0.1.0";
        // A plan at 128: repetition penalty and top-p are 1, all else 0.
        let one = 1.0f32.to_bits();
        let module = format!(
            r#"(module
                (import "[export]{interface}" "[resource-new]session" (func $new (param i32) (result i32)))
                (memory (export "memory") 1) {COMMON}
                (func (export "{interface}#[static]session.create") (param i32 i32 i32 i64) (result i32) {create})
                (func (export "{interface}#[method]session.plan") (param i32 i32 i32 i32) (result i32) {plan})
                (func (export "{interface}#[method]session.choose") (param i32 i32 i32) (result i32) {choose})
                (data (i32.const 128) "{zeroed_plan}"))"#,
            zeroed_plan = words(&[0, 0, one, 0, 0, 0, 0, one, 0, 0, 0, 0, 0]),
        );
        component("sampling", "sampler", &module)
    }
}

/// What a test changes in a chat guest.
pub(crate) struct Chat<'a> {
    /// Body of `recognises`.
    pub(crate) recognises: &'a str,
    /// Body of `render`; leaves the address of a `result<list<segment>, error>`.
    pub(crate) render: &'a str,
    /// Body of a parser's `push`; leaves the address of a `list<delta>`.
    pub(crate) push: &'a str,
}

impl Default for Chat<'_> {
    fn default() -> Self {
        Self {
            recognises: "(i32.const 1)",
            // `special("<s>")`, then the content of the first message as text.
            render: r#"(i32.store (i32.const 228) (i32.load offset=8 (local.get 0)))
                (i32.store (i32.const 232) (i32.load offset=12 (local.get 0)))
                (i32.const 192)"#,
            // One piece of content: the text itself.
            push: "(i32.store (i32.const 264) (local.get 1))
                (i32.store (i32.const 268) (local.get 2))
                (call $reset)
                (i32.const 248)",
        }
    }
}

impl Chat<'_> {
    /// The component.
    pub(crate) fn component(&self) -> Vec<u8> {
        let Self {
            recognises,
            render,
            push,
        } = self;
        let interface = "galerne:chat/format@0.1.0";
        let module = format!(
            r#"(module
                (import "[export]{interface}" "[resource-new]parser" (func $new (param i32) (result i32)))
                (memory (export "memory") 1) {COMMON}
                (func (export "{interface}#recognises") (param i32 i32 i32 i32 i32) (result i32) {recognises})
                (func (export "{interface}#render") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32) {render})
                (func (export "{interface}#[constructor]parser") (param i32 i32 i32 i32) (result i32)
                    (call $new (i32.const 3)))
                (func (export "{interface}#[method]parser.push") (param i32 i32 i32) (result i32) {push})
                (func (export "{interface}#[method]parser.finish") (param i32) (result i32) (i32.const 280))
                (data (i32.const 192) "{ok}")
                (data (i32.const 212) "{special}{text}")
                (data (i32.const 244) "<s>")
                (data (i32.const 248) "{deltas}"))"#,
            ok = words(&[0, 212, 2]),
            special = words(&[1, 244, 3]),
            text = words(&[0]),
            deltas = words(&[260, 1, 0, 0]),
        );
        component("chat", "chat", &module)
    }
}

/// Counts wake-ups.
pub(crate) fn counting_waker() -> (Waker, Arc<AtomicUsize>) {
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    let waker = move || {
        counted.fetch_add(1, Ordering::SeqCst);
    };
    (Arc::new(waker), count)
}

/// Waits for an answer; panics if none comes.
pub(crate) fn wait<T>(mut take: impl FnMut() -> Answer<T>) -> Result<T, GuestError> {
    let patience = Instant::now() + Duration::from_secs(10);
    loop {
        match take() {
            Answer::Ready(answer) => return answer,
            Answer::Pending => assert!(Instant::now() < patience, "no answer in 10 s"),
        }
        std::thread::yield_now();
    }
}

/// Asks for a plan and waits for it.
pub(crate) fn plan(
    session: &mut Box<dyn SamplerSession>,
    position: u32,
    accepted: &[u32],
) -> Result<galerne_core::sampling::SamplingPlan, GuestError> {
    let accepted = accepted.iter().copied().map(galerne_core::ids::TokenId).collect();
    session.request_plan(galerne_core::guest::PlanStep { position, accepted });
    session.flush();
    wait(|| session.take_plan())
}

/// Shows `count` candidates and waits for the choice.
pub(crate) fn choose(session: &mut Box<dyn SamplerSession>, count: u32) -> Result<usize, GuestError> {
    session.request_choice(
        (0..count)
            .map(|token| galerne_core::sampling::Candidate {
                token: galerne_core::ids::TokenId(token),
                logprob: -1.0,
            })
            .collect(),
    );
    session.flush();
    wait(|| session.take_choice())
}
