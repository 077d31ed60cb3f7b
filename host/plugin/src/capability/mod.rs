//! What guests may import: which interfaces, and the way of a guest's question to whoever answers it.

pub(crate) mod asking;
pub(crate) mod grammar;
mod host_calls;
pub(crate) mod inference;
pub(crate) mod kv;
pub(crate) mod log;
pub(crate) mod service;

use galerne_core::capability::Grants;
use galerne_core::guest::World;
use wasmtime::component::{HasSelf, Linker};

use crate::bindings;
use crate::limiter::StoreState;

/// An interface a guest may import if its deployment grants it.
struct Interface {
    name: &'static str,
    /// Which guests.
    worlds: &'static [World],
    is_granted: fn(&Grants) -> bool,
    /// What to write in the deployment's table `[capabilities]`.
    grant: &'static str,
    add: fn(&mut Linker<StoreState>) -> wasmtime::Result<()>,
}

/// Guests that do something; all others decide and do nothing else.
const DOERS: &[World] = &[World::Filter, World::Tool, World::Pipeline];

const INTERFACES: &[Interface] = &[
    Interface {
        name: "galerne:log/logging@0.1.0",
        worlds: DOERS,
        is_granted: |grants| grants.log,
        grant: "log = true",
        add: |linker| {
            bindings::log::galerne::log::logging::add_to_linker::<_, HasSelf<_>>(linker, |state| state)
        },
    },
    Interface {
        name: "galerne:http/client@0.1.0",
        worlds: DOERS,
        is_granted: |grants| !grants.http.is_empty(),
        grant: "http = [\"HOST\"] with the hosts it may call",
        add: |linker| {
            bindings::http::galerne::http::client::add_to_linker::<_, HasSelf<_>>(linker, |state| state)
        },
    },
    Interface {
        name: "galerne:kv/store@0.1.0",
        worlds: DOERS,
        is_granted: |grants| grants.kv,
        grant: "kv = true",
        add: |linker| bindings::kv::galerne::kv::store::add_to_linker::<_, HasSelf<_>>(linker, |state| state),
    },
    Interface {
        name: "galerne:secrets/vault@0.1.0",
        worlds: DOERS,
        is_granted: |grants| !grants.secrets.is_empty(),
        grant: "secrets = [\"NAME\"] with the secrets it may read",
        add: |linker| {
            bindings::secrets::galerne::secrets::vault::add_to_linker::<_, HasSelf<_>>(linker, |state| state)
        },
    },
    Interface {
        name: GRAMMARS,
        worlds: &[World::Sampler],
        is_granted: |grants| grants.grammar,
        grant: "grammar = true",
        add: |linker| {
            bindings::grammar::galerne::grammar::grammars::add_to_linker::<_, HasSelf<_>>(linker, |state| {
                state
            })
        },
    },
];

/// What a sampler that uses grammars imports.
pub(crate) const GRAMMARS: &str = "galerne:grammar/grammars@0.1.0";

/// What a guest may import.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Offer<'a> {
    /// What its deployment grants.
    Granted(&'a Grants),
    /// Every capability, for a guest that is looked at before any deployment uses it.
    All,
}

/// What a pipeline imports, and nobody else may.
const INFERENCE: &str = "galerne:pipeline/inference@0.1.0";

/// A linker with what is offered to a guest of this world.
pub(crate) fn link(linker: &mut Linker<StoreState>, world: World, offer: Offer<'_>) -> wasmtime::Result<()> {
    if world == World::Pipeline {
        bindings::pipeline::galerne::pipeline::inference::add_to_linker::<_, HasSelf<_>>(linker, |state| {
            state
        })?;
    }
    for interface in INTERFACES {
        let is_granted = match offer {
            Offer::Granted(grants) => (interface.is_granted)(grants),
            Offer::All => true,
        };
        if is_granted && interface.worlds.contains(&world) {
            (interface.add)(linker)?;
        }
    }
    Ok(())
}

/// What to do about imports that are capabilities but not offered, if any are. Short enough to come whole out of a cell.
pub(crate) fn advice(imports: &[String], world: World, offer: Offer<'_>) -> Option<String> {
    if world != World::Pipeline && imports.iter().any(|import| import == INFERENCE) {
        return Some(format!(
            "it imports \"{INFERENCE}\", which only pipelines may: make the pipeline a component of its own"
        ));
    }
    let known = |import: &String| INTERFACES.iter().find(|known| known.name == import);
    let imported: Vec<_> = imports.iter().filter_map(known).collect();
    let told = |what_to_do: &str, refused: Vec<String>| {
        (!refused.is_empty()).then(|| format!("{what_to_do}: {}", refused.join("; ")))
    };
    let foreign = imported.iter().filter(|known| !known.worlds.contains(&world));
    let foreign = foreign.map(|known| format!("\"{}\"", known.name)).collect();
    told("leave out what guests of this world cannot have", foreign).or_else(|| {
        let Offer::Granted(grants) = offer else {
            return None;
        };
        let missing = imported.iter().filter(|known| !(known.is_granted)(grants));
        let missing = missing.map(|known| format!("\"{}\" is not granted ({})", known.name, known.grant));
        let what_to_do = "write in the table [capabilities] of the deployment what it needs";
        told(what_to_do, missing.collect())
    })
}
