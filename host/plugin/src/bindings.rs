//! Generated bindings of the six worlds, one in two versions, and of the capabilities, from `wit/`. Nothing else; conversions are in `convert/`.

/// `galerne:model/model@0.1.0`
pub(crate) mod model {
    wasmtime::component::bindgen!({
        path: "../../wit/model/0.1.0",
        world: "model",
    });
}

/// `galerne:chat/chat@0.1.0`
pub(crate) mod chat {
    wasmtime::component::bindgen!({
        path: "../../wit/chat/0.1.0",
        world: "chat",
    });
}

/// `galerne:sampling/sampler@0.1.0`
pub(crate) mod sampling_0_1 {
    wasmtime::component::bindgen!({
        path: "../../wit/sampling/0.1.0",
        world: "sampler",
    });
}

/// `galerne:sampling/sampler@0.2.0`
pub(crate) mod sampling_0_2 {
    wasmtime::component::bindgen!({
        path: "../../wit/sampling/0.2.0",
        world: "sampler",
    });
}

/// `galerne:grammar/imports@0.1.0`
pub(crate) mod grammar {
    wasmtime::component::bindgen!({
        path: "../../wit/grammar/0.1.0",
        world: "imports",
        // What ends the request is a trap.
        imports: { default: trappable },
        with: {
            "galerne:grammar/grammars.grammar": crate::capability::grammar::Grammar,
        },
    });
}

/// `galerne:filter/filter@0.1.0`
pub(crate) mod filter {
    wasmtime::component::bindgen!({
        path: "../../wit/filter/0.1.0",
        world: "filter",
    });
}

/// `galerne:tool/tool@0.1.0`
pub(crate) mod tool {
    wasmtime::component::bindgen!({
        path: "../../wit/tool/0.1.0",
        world: "tool",
    });
}

/// `galerne:pipeline/pipeline@0.1.0`
pub(crate) mod pipeline {
    wasmtime::component::bindgen!({
        path: "../../wit/pipeline/0.1.0",
        world: "pipeline",
        // Limits end the request.
        imports: { default: trappable },
        with: {
            "galerne:pipeline/inference.context": crate::capability::inference::Context,
            "galerne:pipeline/inference.generation": crate::capability::inference::Generation,
        },
    });
}

/// `galerne:log/imports@0.1.0`
pub(crate) mod log {
    wasmtime::component::bindgen!({
        path: "../../wit/log/0.1.0",
        world: "imports",
        // Too much of it ends the request.
        imports: { default: trappable },
    });
}

/// `galerne:http/imports@0.1.0`
pub(crate) mod http {
    wasmtime::component::bindgen!({
        path: "../../wit/http/0.1.0",
        world: "imports",
    });
}

/// `galerne:kv/imports@0.1.0`
pub(crate) mod kv {
    wasmtime::component::bindgen!({
        path: "../../wit/kv/0.1.0",
        world: "imports",
    });
}

/// `galerne:secrets/imports@0.1.0`
pub(crate) mod secrets {
    wasmtime::component::bindgen!({
        path: "../../wit/secrets/0.1.0",
        world: "imports",
    });
}
