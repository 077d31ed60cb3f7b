//! The world `galerne:tool/tool`: functions a model may call.

use serde_json::Value;

/// Generated from `wit/tool`.
#[allow(
    unsafe_code,
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod bindings {
    wit_bindgen::generate!({
        world: "tool",
        path: "../wit/tool/0.1.0",
        pub_export_macro: true,
        default_bindings_module: "galerne_sdk::tool::bindings",
    });
}

pub use bindings::exports::galerne::tool::tools::{Error, RequestInfo, Tool};

/// Some functions.
pub trait Tools {
    /// What there is; `params` are the deployment's for this tool, an empty object if it gives none.
    ///
    /// # Errors
    /// Parameters that make no sense, in words for who deploys it.
    fn list(params: &Value) -> Result<Vec<Tool>, String>;

    /// Runs the function `name`, which is one of those listed. The answer is for the model to read.
    ///
    /// # Errors
    /// Also for the model to read.
    fn call(params: &Value, info: &RequestInfo, name: &str, arguments: &Value) -> Result<String, Error>;
}

/// A function from its parts; `parameters` is the JSON schema of its arguments.
#[must_use]
pub fn tool(name: &str, description: &str, parameters: &Value) -> Tool {
    Tool {
        name: name.to_owned(),
        description: description.to_owned(),
        parameters_json: parameters.to_string(),
    }
}

/// An argument that is text.
///
/// # Errors
/// It is missing or something else.
pub fn text_argument<'a>(arguments: &'a Value, name: &str) -> Result<&'a str, Error> {
    let got = &arguments[name];
    let wrong = || Error::Arguments(format!("argument \"{name}\": expected a text, got {got}"));
    got.as_str().ok_or_else(wrong)
}

/// Parses the parameters and lists; what the exported function does.
///
/// # Errors
/// Parameters that are not JSON, and what [`Tools::list`] returns.
pub fn list_from_text<T: Tools>(params_json: &str) -> Result<Vec<Tool>, String> {
    T::list(&params(params_json)?)
}

/// Parses parameters and arguments, and calls; what the exported function does.
///
/// # Errors
/// Parameters or arguments that are not JSON, and what [`Tools::call`] returns.
pub fn call_from_text<T: Tools>(
    info: &RequestInfo,
    name: &str,
    arguments_json: &str,
) -> Result<String, Error> {
    let params = params(&info.params_json).map_err(Error::Failed)?;
    let arguments: Value = serde_json::from_str(arguments_json).map_err(|error| {
        Error::Arguments(format!("arguments: expected a JSON object, got no JSON: {error}"))
    })?;
    if !arguments.is_object() {
        return Err(Error::Arguments(format!(
            "arguments: expected a JSON object, got {arguments}"
        )));
    }
    T::call(&params, info, name, &arguments)
}

fn params(json: &str) -> Result<Value, String> {
    serde_json::from_str(json).map_err(|error| format!("params: not JSON: {error}"))
}

/// Makes a type that implements [`Tools`] this guest's export.
#[macro_export]
macro_rules! export_tool {
    ($tools:ty) => {
        const _: () = {
            use $crate::tool::bindings::exports::galerne::tool::tools as wit;

            struct Export;

            impl wit::Guest for Export {
                fn list(params_json: String) -> Result<Vec<wit::Tool>, String> {
                    $crate::tool::list_from_text::<$tools>(&params_json)
                }

                fn call(
                    info: wit::RequestInfo,
                    name: String,
                    arguments_json: String,
                ) -> Result<String, wit::Error> {
                    $crate::tool::call_from_text::<$tools>(&info, &name, &arguments_json)
                }
            }

    $crate::tool::bindings::export!(Export with_types_in $crate::tool::bindings);
        };
    };
}
