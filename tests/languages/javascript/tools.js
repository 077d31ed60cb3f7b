// A tool that counts days between two dates, because models are bad at it.
//
// `result` of the contract is what a function returns, or what it throws: the error's value. Names are in camel case.

const WEEKDAYS = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const DAY_MS = 24 * 60 * 60 * 1000;

const DATE_SCHEMA = { type: "string", description: "a date as YYYY-MM-DD" };

const DAYS_BETWEEN = {
  name: "days_between",
  description:
    "Counts the days from one date to another, negative if the second is earlier, and gives the weekdays of both.",
  parametersJson: JSON.stringify({
    type: "object",
    properties: { from: DATE_SCHEMA, to: DATE_SCHEMA },
    required: ["from", "to"],
    additionalProperties: false,
  }),
};

/** The milliseconds from 1970 to a date that exists. */
function parseDate(name, text) {
  const form = typeof text === "string" && /^\d{4}-\d{2}-\d{2}$/.test(text);
  const ms = form ? Date.parse(text) : NaN;
  // The 31st of April is read as the 1st of May.
  if (Number.isNaN(ms) || new Date(ms).toISOString().slice(0, 10) !== text) {
    throw { tag: "arguments", val: `${name}: expected a date as YYYY-MM-DD, got ${JSON.stringify(text)}` };
  }
  return ms;
}

function parseObject(json) {
  let value;
  try {
    value = JSON.parse(json);
  } catch (error) {
    throw { tag: "arguments", val: `expected JSON, got ${json}: ${error.message}` };
  }
  if (value === null || typeof value !== "object" || Array.isArray(value)) {
    throw { tag: "arguments", val: `expected an object, got ${json}` };
  }
  return value;
}

/** The interface `tools` of the contract. */
export const tools = {
  list(paramsJson) {
    if (Object.keys(JSON.parse(paramsJson)).length > 0) {
      throw `params: this tool has none, got ${paramsJson}`;
    }
    return [DAYS_BETWEEN];
  },

  call(_info, name, argumentsJson) {
    if (name !== DAYS_BETWEEN.name) {
      throw { tag: "failed", val: `there is no function "${name}", only ${DAYS_BETWEEN.name}` };
    }
    const { from, to } = parseObject(argumentsJson);
    const [begin, end] = [parseDate("from", from), parseDate("to", to)];
    return JSON.stringify({
      days: Math.round((end - begin) / DAY_MS),
      from: WEEKDAYS[new Date(begin).getUTCDay()],
      to: WEEKDAYS[new Date(end).getUTCDay()],
    });
  },
};
