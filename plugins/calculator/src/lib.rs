//! A tool that evaluates arithmetic, because models are bad at it: `calculate` with the argument `expression`.

mod evaluate;
mod functions;
mod number;

use galerne_sdk::json::{Value, json};
use galerne_sdk::tool::{Error, RequestInfo, Tool, Tools, text_argument, tool};

struct Calculator;

const NAME: &str = "calculate";
const DESCRIPTION: &str = "Evaluates an arithmetic expression and gives its value as a decimal number. Knows + - * / ^ \
    (power), % (remainder, with the sign of the divisor), parentheses, the constants pi, tau and e, and the functions \
    abs, sign, floor, ceil, trunc, round(x) and round(x, digits), sqrt, cbrt, exp, ln, log10, log2, log(x, base), sin, cos, \
    tan, asin, acos, atan, atan2(y, x), sinh, cosh, tanh (angles in radians), degrees, radians, hypot, min, max, gcd, lcm \
    and factorial. Integers are exact up to 38 digits, other numbers to 15.";

impl Tools for Calculator {
    fn list(params: &Value) -> Result<Vec<Tool>, String> {
        if params.as_object().is_none_or(|params| !params.is_empty()) {
            return Err(format!("params: calculator has none, got {params}"));
        }
        let schema = json!({
            "type": "object",
            "properties": {"expression": {"type": "string", "description": "for example (3 + 4) * 2 ^ 10 / sqrt(2)"}},
            "required": ["expression"],
            "additionalProperties": false,
        });
        Ok(vec![tool(NAME, DESCRIPTION, &schema)])
    }

    fn call(_: &Value, _: &RequestInfo, name: &str, arguments: &Value) -> Result<String, Error> {
        if name != NAME {
            return Err(Error::Failed(format!(
                "calculator has no function \"{name}\"; it has {NAME}"
            )));
        }
        let value = evaluate::evaluate(text_argument(arguments, "expression")?).map_err(Error::Arguments)?;
        Ok(value.to_string())
    }
}

galerne_sdk::export_tool!(Calculator);

#[cfg(test)]
mod tests;
