//! Rotary frequencies and their scaling schemes (Su et al. 2021; linear: Chen et al. 2023; llama3: Grattafiori et al. 2024).

use std::f64::consts::PI;

use galerne_sdk::graph::Rope;
use galerne_sdk::json::Value;
use galerne_sdk::model::{Error, RopePairing};

use crate::config::{Fields, field_error};

/// That of the first Llama, whose configurations do not state it.
const THETA_DEFAULT: f64 = 10_000.0;
const NO_SCALING: &str = "default";

/// The rotation of heads of `head_width` elements. Newer configurations keep everything in `rope_parameters`,
/// older ones have `rope_theta` beside an optional `rope_scaling`.
pub(crate) fn read(config: &Value, head_width: u32) -> Result<Rope, Error> {
    let scaling = match &config["rope_parameters"] {
        Value::Null => &config["rope_scaling"],
        parameters => parameters,
    };
    if !scaling.is_null() && !scaling.is_object() {
        return Err(field_error("rope_scaling", "an object", &scaling.to_string()));
    }
    let theta_of = [scaling, config]
        .into_iter()
        .find(|fields| !fields["rope_theta"].is_null());
    let theta = Fields(theta_of.unwrap_or(config)).number("rope_theta", Some(THETA_DEFAULT))?;
    for fields in [scaling, config] {
        // Half-rotated heads are another family's; rotating them whole would give a wrong model without an error.
        if Fields(fields).number("partial_rotary_factor", Some(1.0))? != 1.0 {
            return Err(Error::Unsupported(format!(
                "partial_rotary_factor {}",
                fields["partial_rotary_factor"]
            )));
        }
    }
    if theta <= 1.0 {
        return Err(field_error("rope_theta", "a number above 1", &theta.to_string()));
    }
    if !head_width.is_multiple_of(2) {
        return Err(field_error(
            "head_dim",
            "an even number, for rotary positions",
            &head_width.to_string(),
        ));
    }
    let mut inv_freq: Vec<f64> = (0..head_width / 2)
        .map(|i| theta.powf(-2.0 * f64::from(i) / f64::from(head_width)))
        .collect();
    scale(&mut inv_freq, scaling)?;
    let inv_freq = inv_freq.into_iter().map(|freq| freq as f32).collect();
    Ok(Rope {
        inv_freq,
        pairing: RopePairing::Half,
        attention_factor: 1.0,
    })
}

fn scale(inv_freq: &mut [f64], scaling: &Value) -> Result<(), Error> {
    if scaling.is_null() {
        return Ok(());
    }
    // "type" is the older name.
    let fields = Fields(scaling);
    let older = fields.text("type", Some(NO_SCALING))?;
    let kind = fields.text("rope_type", Some(older))?;
    match kind {
        // A factor that nobody says how to apply must not be dropped.
        NO_SCALING if !scaling["factor"].is_null() && scaling["rope_type"].is_null() => {
            return Err(field_error("rope_scaling.rope_type", "a text", "null"));
        }
        NO_SCALING => {}
        "linear" => {
            let factor = required(scaling, "factor")?;
            inv_freq.iter_mut().for_each(|freq| *freq /= factor);
        }
        "llama3" => {
            let llama3 = Llama3 {
                factor: required(scaling, "factor")?,
                low: required(scaling, "low_freq_factor")?,
                high: required(scaling, "high_freq_factor")?,
                context: required(scaling, "original_max_position_embeddings")?,
            };
            if llama3.high <= llama3.low {
                return Err(field_error(
                    "high_freq_factor",
                    "more than low_freq_factor",
                    &llama3.high.to_string(),
                ));
            }
            inv_freq.iter_mut().for_each(|freq| *freq = llama3.scale(*freq));
        }
        other => return Err(Error::Unsupported(format!("rope_scaling of type \"{other}\""))),
    }
    Ok(())
}

fn required(scaling: &Value, field: &str) -> Result<f64, Error> {
    let number = Fields(scaling).number(field, Some(0.0))?;
    if number > 0.0 {
        Ok(number)
    } else {
        Err(field_error(
            &format!("rope_scaling.{field}"),
            "a number above 0",
            &scaling[field].to_string(),
        ))
    }
}

/// Long wavelengths are stretched by `factor`, short ones kept, those between blended.
struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    context: f64,
}

impl Llama3 {
    fn scale(&self, freq: f64) -> f64 {
        let wavelength = 2.0 * PI / freq;
        if wavelength < self.context / self.high {
            return freq;
        }
        if wavelength > self.context / self.low {
            return freq / self.factor;
        }
        let smooth = (self.context / wavelength - self.low) / (self.high - self.low);
        (1.0 - smooth) * freq / self.factor + smooth * freq
    }
}

#[cfg(test)]
mod tests {
    use galerne_sdk::json::json;

    use super::*;

    fn check(config: &Value, head_width: u32, expected: &[(usize, f64)]) {
        let rope = read(config, head_width).expect("a rotation");
        assert_eq!(rope.inv_freq.len(), head_width as usize / 2);
        for (index, value) in expected {
            let got = f64::from(rope.inv_freq[*index]);
            assert!(
                (got / value - 1.0).abs() < 1e-6,
                "inv_freq[{index}]: expected {value}, got {got}"
            );
        }
    }

    #[test]
    fn plain_frequencies_are_powers_of_theta() {
        check(
            &json!({}),
            64,
            &[(0, 1.0), (16, 0.01), (31, 1.333_521_432_163_324e-4)],
        );
        check(
            &json!({"rope_theta": 100_000.0}),
            64,
            &[(16, 0.003_162_277_660_168_379_5)],
        );
        check(
            &json!({"rope_parameters": {"rope_theta": 100_000.0, "rope_type": "default"}}),
            64,
            &[(16, 0.003_162_277_660_168_379_5)],
        );
    }

    #[test]
    fn linear_scaling_divides() {
        check(
            &json!({"rope_scaling": {"type": "linear", "factor": 4.0}}),
            64,
            &[(0, 0.25), (16, 0.0025)],
        );
    }

    #[test]
    fn what_cannot_be_rotated_rightly_is_refused_by_name() {
        for (config, word) in [
            (json!({"rope_scaling": {"factor": 4.0}}), "rope_type"),
            (json!({"rope_scaling": {"rope_type": 3}}), "rope_type"),
            (json!({"rope_scaling": "linear"}), "rope_scaling"),
            (json!({"rope_scaling": {"rope_type": "linear"}}), "factor"),
            (json!({"rope_scaling": {"type": "yarn", "factor": 4.0}}), "yarn"),
            (
                json!({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}),
                "low_freq_factor",
            ),
            (json!({"rope_theta": 0}), "rope_theta"),
            (json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
            (
                json!({"rope_parameters": {"rope_theta": 10_000.0, "partial_rotary_factor": 0.25}}),
                "partial_rotary_factor",
            ),
        ] {
            let (Err(Error::Config(text)) | Err(Error::Unsupported(text))) = read(&config, 64) else {
                panic!("{config} was accepted");
            };
            assert!(text.contains(word), "{config}: {text}");
        }
        assert!(read(&json!({}), 63).is_err(), "an odd width has no pairs");
    }

    /// Llama 3.1's parameters; expected numbers computed apart, in Python, from the published formula.
    #[test]
    fn llama3_scaling_keeps_short_and_stretches_long_wavelengths() {
        let config = json!({"rope_theta": 500_000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
            "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}});
        check(&config, 128, LLAMA3_EXPECTED);
    }

    const LLAMA3_EXPECTED: &[(usize, f64)] = &[
        (0, 1.0),
        (10, 0.12868737343265052),
        (28, 0.0032114459947525913),
        (29, 0.002166570763503359),
        (31, 0.0008567514129196321),
        (33, 0.00031269375038406517),
        (34, 0.00017850781276799638),
        (35, 9.556212353964683e-05),
        (50, 4.411534674558404e-06),
        (63, 3.068925988914511e-07),
    ];
}
