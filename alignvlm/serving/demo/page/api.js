// What the page asks the server: the OpenAI API, and two routes of the demo's own. Every error is one line for a person.

const GONE = "The server does not answer. Is it still running? Your question is kept: ask again when it is back.";

let key = null;

/** What every request carries from now on. */
export function setKey(given) {
  key = given;
}

/** Errors have the response's status, where there was one. */
async function request(path, options = {}) {
  const headers = { ...options.headers, ...(key === null ? {} : { Authorization: `Bearer ${key}` }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error(GONE);
  }
  if (!response.ok) throw Object.assign(new Error(await explain(response)), { status: response.status });
  return response;
}

async function explain(response) {
  const text = await response.text();
  let said = null;
  try {
    said = message(JSON.parse(text));
  } catch {
    // no JSON: a proxy's page
  }
  if (said) return said;
  if (response.status === 413) return "This is more than the server takes: remove an image or make it smaller.";
  return `The server answered with error ${response.status}${response.statusText ? ` (${response.statusText})` : ""}.`;
}

/** The message in an error of OpenAI's kind, FastAPI's, or plain text. */
function message(body) {
  const said = body?.error?.message ?? body?.error ?? body?.detail ?? body?.message;
  return typeof said === "string" ? said : said ? JSON.stringify(said) : null;
}

export const getConfig = async () => (await request("demo/config.json")).json();

export async function getModels() {
  const { data } = await (await request("v1/models")).json();
  return data.map((model) => model.id);
}

export const getBlob = async (path) => (await request(path)).blob();

export async function getVocabulary(blob) {
  const headers = { "Content-Type": "application/octet-stream" };
  return (await request("demo/vocabulary", { method: "POST", headers, body: blob })).json();
}

/**
 * Stream an answer. Calls onText with every piece.
 * Returns why it ended ("stop", "length", …) and the number of tokens where the server says it.
 */
export async function ask(body, onText, signal) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  let reason = null, tokens = null;
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new Error(message(chunk));
    tokens = chunk.usage?.completion_tokens ?? tokens;
    for (const choice of chunk.choices ?? []) {
      if (choice.delta?.content) onText(choice.delta.content);
      reason = choice.finish_reason ?? reason;
    }
  }
  if (reason === null) throw new Error("The server ended the answer before it was complete.");
  return { reason, tokens };
}

/** The data of server-sent events, whatever pieces they come in. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    let piece;
    try {
      piece = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Error("The connection broke before the answer was complete. Is the server still running?");
    }
    rest += piece.done ? "\n\n" : piece.value;
    const blocks = rest.split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
    if (piece.done) return;
  }
}
