//! Generated bindings of the five worlds, from `wit/`. Nothing else; conversions are in `convert/`.

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
pub(crate) mod sampling {
    wasmtime::component::bindgen!({
        path: "../../wit/sampling/0.1.0",
        world: "sampler",
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
