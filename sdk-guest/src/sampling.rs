//! The world `galerne:sampling/sampler`: a rule that draws tokens.

use serde_json::Value;

/// Generated from `wit/sampling`.
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
        world: "sampler",
        path: "../wit/sampling/0.2.0",
        pub_export_macro: true,
        default_bindings_module: "galerne_sdk::sampling::bindings",
    });
}

pub use bindings::exports::galerne::sampling::sampling::{Bias, Candidate, Plan, SequenceInfo, Step};

/// The state of one sequence under a sampling rule.
pub trait Session: Sized {
    /// A session for a sequence; `params` are the request's, an empty object if it gave none.
    ///
    /// # Errors
    /// Parameters that make no sense, in words for the client.
    fn create(params: &Value, info: &SequenceInfo) -> Result<Self, String>;
    /// The plan of the next step.
    fn plan(&mut self, step: &Step) -> Plan;
    /// The index of the chosen candidate; there is at least one, most likely first.
    fn choose(&mut self, candidates: &[Candidate]) -> u32;
}

/// A plan that draws from the whole distribution: a start for one's own.
#[must_use]
pub fn plain_plan() -> Plan {
    Plan {
        grammar: None,
        bias: Vec::new(),
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        forced: Vec::new(),
        proposed: Vec::new(),
        valid_steps: 1,
        candidates: 0,
    }
}

/// Numbers that follow from a seed, for a session's own draws: equal seeds must give equal choices. `SplitMix64`, Steele, Lea
/// and Flood 2014.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// From [`SequenceInfo::seed`].
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// In `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// The place of one of these weights, each as likely as it is large; the last if rounding leaves none.
    pub fn pick(&mut self, weights: &[f64]) -> usize {
        let mut left = self.uniform() * weights.iter().sum::<f64>();
        let picked = weights.iter().position(|weight| {
            left -= weight;
            left < 0.0
        });
        picked.unwrap_or(weights.len().saturating_sub(1))
    }
}

/// Parses the parameters and creates; what the exported function does.
///
/// # Errors
/// Parameters that are not JSON, and what [`Session::create`] returns.
pub fn create_from_text<S: Session>(info: &SequenceInfo) -> Result<S, String> {
    let params =
        serde_json::from_str(&info.params_json).map_err(|error| format!("params: not JSON: {error}"))?;
    S::create(&params, info)
}

/// Makes a type that implements [`Session`] this guest's export.
#[macro_export]
macro_rules! export_sampler {
    ($session:ty) => {
        const _: () = {
            use $crate::sampling::bindings::exports::galerne::sampling::sampling as wit;

            struct Export;
            struct ExportSession(std::cell::RefCell<$session>);

            impl wit::Guest for Export {
                type Session = ExportSession;
            }

            impl wit::GuestSession for ExportSession {
                fn create(info: wit::SequenceInfo) -> Result<wit::Session, String> {
                    let session = $crate::sampling::create_from_text::<$session>(&info)?;
                    Ok(wit::Session::new(ExportSession(std::cell::RefCell::new(
                        session,
                    ))))
                }

                fn plan(&self, step: wit::Step) -> wit::Plan {
                    $crate::sampling::Session::plan(&mut *self.0.borrow_mut(), &step)
                }

                fn choose(&self, candidates: Vec<wit::Candidate>) -> u32 {
                    $crate::sampling::Session::choose(&mut *self.0.borrow_mut(), &candidates)
                }
            }

    $crate::sampling::bindings::export!(Export with_types_in $crate::sampling::bindings);
        };
    };
}
