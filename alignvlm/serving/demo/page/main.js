// The page: images, a question, an answer that streams, and what the connector read in the image.

import { ask, getBlob, getConfig, getModels, getVocabulary, setKey } from "./api.js";
import { alert, clearAlerts, find, make } from "./dom.js";
import { dataUrl, Images } from "./images.js";
import { Overlay } from "./overlay.js";

const overlay = new Overlay();
const views = new WeakMap(); // image -> promise of its view
let config = null, images = null, turns = [], running = null, choosing = false;

async function start() {
  while (config === null) {
    try {
      config = await getConfig();
    } catch (error) {
      if (error.status !== 401) return setServer("not reached", "bad", error.message);
      setKey(await askKey());
    }
  }
  document.title = `${config.title} · AlignVLM demo`;
  find("model").textContent = config.title;
  find("hint").hidden = find("tokens-switch").hidden = !config.vocabulary;
  images = new Images(config.limits, startAnew, show);
  for (const id of ["add", "drop", "ask"]) find(id).disabled = false;
  showExamples(config.examples);
  await connect();
}

/** The key that whoever started the server has set. */
function askKey() {
  const form = find("entry"), field = find("key");
  setServer("wants its key", "open", field.value ? "This is not the key of the server." : null);
  form.hidden = false;
  field.select();
  return new Promise((resolve) => {
    const enter = (event) => {
      event.preventDefault();
      form.hidden = true;
      clearAlerts();
      resolve(field.value);
    };
    form.addEventListener("submit", enter, { once: true });
  });
}

/** Which models the server has; asked again before a question while it has not answered. */
async function connect() {
  try {
    const models = await getModels();
    find("choice").replaceChildren(...models.map((id) => make("option", { value: id }, id)));
    find("models").hidden = models.length < 2;
    setServer("ready", "done");
  } catch (error) {
    setServer("not reached", "bad", error.message);
  }
}

function setServer(text, kind, problem = null) {
  find("server").textContent = text;
  find("server").className = `state ${kind}`;
  if (problem) alert(problem);
}

async function show(image) {
  overlay.show(image);
  if (image === null || !config.vocabulary) return;
  try {
    if (!views.has(image)) views.set(image, getVocabulary(image.file));
    const view = await views.get(image);
    if (images.shown === image && view.cells.length) overlay.lay(view);
  } catch (error) {
    views.delete(image);
    if (images.shown === image) alert(`${image.name}: ${error.message}`);
  }
}

/** Answers about other images are no longer part of the conversation; they stay on the page. */
function startAnew() {
  stop();
  if (turns.length) find("log").append(make("p", { class: "divide" }, "New conversation"));
  turns = [];
  find("fresh").hidden = true;
}

/** Ask what stands in the field, one question at a time. */
async function submit(expected = null) {
  const question = find("question").value.trim();
  if (running || !config) return;
  clearAlerts();
  if (!question) {
    alert("Write a question first.");
    return find("question").focus();
  }
  const controller = (running = new AbortController());
  setRunning();
  try {
    if (!find("choice").value) await connect();
    if (find("choice").value && !controller.signal.aborted) await tell(question, expected, controller.signal);
  } finally {
    if (running === controller) running = null;
    find("fresh").hidden = turns.length === 0;
    setRunning();
  }
}

/** Show the question and its answer as it comes; what goes wrong is said. */
async function tell(question, expected, signal) {
  const conversation = turns;
  const [about, answer] = addTurn(question);
  find("question").value = "";
  const started = performance.now();
  const said = () => answer.textContent.trim();
  try {
    const { reason, tokens } = await ask(await body(question), (text) => answer.append(text), signal);
    const seconds = `${((performance.now() - started) / 1000).toFixed(1)} s`;
    const notes = [seconds, tokens === null ? null : `${tokens} tokens`, reason === "length" ? "cut at the longest answer (Settings)" : null];
    about.textContent = notes.filter(Boolean).join(" · ");
    if (expected) about.append(`\nExpected: ${expected}`);
    conversation.push({ question, answer: said() });
    if (!said()) answer.textContent = "(empty answer)";
    find("status").textContent = `Answer: ${said()}`;
    setServer("ready", "done");
  } catch (error) {
    if (error.name === "AbortError") {
      about.textContent = "stopped";
      find("status").textContent = "The answer was stopped.";
      if (said()) conversation.push({ question, answer: said() });
    } else {
      about.textContent = "no complete answer";
      if (!find("question").value) find("question").value = question;
      alert(error.message);
    }
  } finally {
    answer.setAttribute("aria-busy", "false");
  }
}

function stop() {
  running?.abort();
  running = null;
}

/** The request: the images stand in the first message of the conversation. */
async function body(question) {
  const asked = [...(find("history").checked ? turns : []), { question }];
  const parts = await Promise.all(images.list.map(async ({ file }) => ({ type: "image_url", image_url: { url: await dataUrl(file) } })));
  const messages = asked.flatMap((turn, number) => {
    const user = { role: "user", content: [...(number ? [] : parts), { type: "text", text: turn.question }] };
    return turn.answer === undefined ? [user] : [user, { role: "assistant", content: turn.answer }];
  });
  const number = (id, otherwise) => (Number.isFinite(find(id).valueAsNumber) ? find(id).valueAsNumber : otherwise);
  return { model: find("choice").value, messages, max_tokens: number("longest", 256), temperature: number("temperature", 0) };
}

function addTurn(question) {
  const count = images.list.length;
  const pictures = count ? make("small", {}, count === 1 ? "1 image" : `${count} images`) : null;
  const answer = make("p", { class: "answer", "aria-busy": "true" });
  const about = make("p", { class: "about" });
  const turn = make("article", { class: "turn" }, make("p", { class: "asked" }, question, pictures), answer, about);
  find("log").append(turn);
  turn.scrollIntoView({ block: "nearest" });
  return [about, answer];
}

/** Ask or Stop, whichever there is to do; the keyboard stays where it is. */
function setRunning() {
  const [hidden, shown] = running ? [find("ask"), find("stop")] : [find("stop"), find("ask")];
  const hadFocus = document.activeElement === hidden;
  hidden.hidden = true;
  shown.hidden = false;
  if (hadFocus) shown.focus({ preventScroll: true });
}

function showExamples(examples) {
  find("examples").hidden = examples.length === 0;
  find("cards").replaceChildren(
    ...examples.map((example) => {
      const pictures = example.images.map(preview);
      const card = make("button", { type: "button", click: () => tryExample(example) }, make("span", { class: "pictures" }, ...pictures), make("span", { class: "question" }, example.question), make("small", {}, example.task));
      return make("li", {}, card);
    }),
  );
}

/** A picture of the gallery; an address alone would come without the key. */
function preview(path) {
  const picture = make("img", { alt: "" });
  getBlob(path).then((blob) => picture.setAttribute("src", URL.createObjectURL(blob)), (error) => alert(error.message));
  return picture;
}

async function tryExample(example) {
  if (choosing) return; // a second click
  choosing = true;
  stop();
  try {
    const blobs = await Promise.all(example.images.map(getBlob));
    images.clear();
    await images.add(blobs.map((blob, i) => new File([blob], `${example.task} ${i + 1}`, { type: blob.type })));
  } catch (error) {
    return alert(error.message);
  } finally {
    choosing = false;
  }
  find("question").value = example.question;
  window.scrollTo({ top: 0 });
  await submit(example.answers.map((answer) => answer.replaceAll("\n", " · ")).join(" / "));
}

find("form").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
find("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    submit();
  }
});
// Ask becomes Stop under the pointer: the second click of a double click is not meant for it.
find("stop").addEventListener("click", (event) => event.detail < 2 && running?.abort());
find("fresh").addEventListener("click", startAnew);

start();
