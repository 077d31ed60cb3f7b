//! What a component says of itself: its worlds and imports, or in words why it fits none. Instantiates nothing.

use galerne_core::guest::World;
use wasmtime::Engine;
use wasmtime::component::Component;

/// Interfaces a component exports to be of a world, and the versions of each that this host speaks, the newest last.
const EXPORTS: &[(&str, World, &[&str])] = &[
    ("galerne:model/architecture", World::Model, &["0.1.0"]),
    ("galerne:chat/format", World::Chat, &["0.1.0"]),
    ("galerne:sampling/sampling", World::Sampler, &["0.1.0", "0.2.0"]),
    ("galerne:filter/filtering", World::Filter, &["0.1.0"]),
    ("galerne:tool/tools", World::Tool, &["0.1.0"]),
    ("galerne:pipeline/pipelines", World::Pipeline, &["0.1.0"]),
];
/// Names listed in one message.
const LISTED_MAX: usize = 8;

/// Package, world and newest version, for messages.
pub(crate) fn full_name(world: World) -> &'static str {
    match world {
        World::Model => "galerne:model/model@0.1.0",
        World::Chat => "galerne:chat/chat@0.1.0",
        World::Sampler => "galerne:sampling/sampler@0.2.0",
        World::Filter => "galerne:filter/filter@0.1.0",
        World::Tool => "galerne:tool/tool@0.1.0",
        World::Pipeline => "galerne:pipeline/pipeline@0.1.0",
    }
}

/// The first bytes of every WebAssembly file.
const MAGIC: &[u8] = b"\0asm";
/// What follows in a component, and in a core module.
const COMPONENT: &[u8] = &[0x0d, 0, 1, 0];
const CORE_MODULE: &[u8] = &[1, 0, 0, 0];

/// Says what is wrong with bytes that are no component, as far as their beginning tells.
pub(crate) fn check_header(bytes: &[u8]) -> Result<(), String> {
    if !bytes.starts_with(MAGIC) {
        let begin = String::from_utf8_lossy(&bytes[..bytes.len().min(8)])
            .escape_debug()
            .to_string();
        return Err(format!(
            "it is no WebAssembly file (it begins with \"{begin}\"); give the .wasm file of a component"
        ));
    }
    match bytes.get(4..8) {
        Some(COMPONENT) => Ok(()),
        Some(CORE_MODULE) => Err(
            "it is a core module, not a component; `galerne plugin build` makes a component of it, \
             or `wasm-tools component new`"
                .to_owned(),
        ),
        Some(other) => Err(format!(
            "it is WebAssembly of an unknown kind ({other:02x?}); expected a component"
        )),
        None => Err("it ends within its header: the file is truncated; copy or build it again".to_owned()),
    }
}

/// What goes with a compiler's error about bytes that begin like a component.
pub(crate) fn broken(reason: &str) -> String {
    if reason.contains("unexpected end") {
        format!("the file is truncated ({reason}); copy or build it again")
    } else {
        format!("it is no valid component ({reason}); build it again with the SDK's toolchain")
    }
}

/// The worlds whose exports the component has, at least one.
pub(crate) fn worlds(engine: &Engine, component: &Component) -> Result<Vec<World>, String> {
    let exports = exports(engine, component);
    let mut worlds = Vec::new();
    for export in &exports {
        let (interface, version) = export.split_once('@').unwrap_or((export, "none"));
        let Some((_, world, versions)) = EXPORTS.iter().find(|(known, ..)| *known == interface) else {
            continue;
        };
        if !versions.contains(&version) {
            return Err(format!(
                "it exports {interface} in version {version}, and this host speaks {}; \
                 build it with the SDK of this host's version",
                versions.join(" and ")
            ));
        }
        worlds.push(*world);
    }
    if worlds.is_empty() {
        let known: Vec<String> = EXPORTS
            .iter()
            .filter_map(|(name, world, versions)| Some(format!("{name}@{} ({world})", versions.last()?)))
            .collect();
        return Err(format!(
            "it exports {}; expected one of {}",
            listed(&exports),
            known.join(", ")
        ));
    }
    worlds.sort_unstable();
    // A component may bring several versions of one world.
    worlds.dedup();
    Ok(worlds)
}

/// The names of all exports.
pub(crate) fn exports(engine: &Engine, component: &Component) -> Vec<String> {
    let ty = component.component_type();
    ty.exports(engine).map(|(name, _)| name.to_owned()).collect()
}

/// The names of all imports.
pub(crate) fn imports(engine: &Engine, component: &Component) -> Vec<String> {
    let ty = component.component_type();
    ty.imports(engine).map(|(name, _)| name.to_owned()).collect()
}

/// What to do about imports that no host offers.
pub(crate) fn import_advice(imports: &[String]) -> &'static str {
    if imports.iter().any(|name| name.starts_with("wasi:")) {
        "guests get no WASI: build for the target wasm32-unknown-unknown, without files, clocks, sockets and environment"
    } else {
        "leave these imports out"
    }
}

/// The first of these names.
pub(crate) fn listed(names: &[String]) -> String {
    if names.is_empty() {
        return "nothing".to_owned();
    }
    let first: Vec<String> = names
        .iter()
        .take(LISTED_MAX)
        .map(|name| format!("\"{name}\""))
        .collect();
    match names.len().saturating_sub(LISTED_MAX) {
        0 => first.join(", "),
        more => format!("{} and {more} more", first.join(", ")),
    }
}
