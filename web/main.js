// Trains what the server hands out as config.toml and text, shows every step, and posts the outcome to `outcome`.
// The smoke test (tests/browser.rs) is such a server.
import init, { train } from "./pkg/polystage.js";

const element = (id) => document.getElementById(id);

async function get(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: HTTP status ${response.status}`);
  return response;
}

function show(row) {
  const cells = [row.step, row.loss.toFixed(6), row.grad_norm.toFixed(4), row.step_seconds.toFixed(3)];
  const line = element("rows").insertRow();
  for (const cell of cells) line.insertCell().textContent = cell;
}

function report(outcome) {
  return fetch("outcome", { method: "POST", body: JSON.stringify(outcome) });
}

function fail(message) {
  element("status").textContent = `Failed: ${message}`;
  element("status").className = "failed";
  return report({ error: message });
}

// A panic in a task of the wasm leaves the promise of `train` unsettled: it arrives only here.
addEventListener("error", (event) => fail(event.message));
addEventListener("unhandledrejection", (event) => fail(String(event.reason)));

try {
  await init();
  const config = await (await get("config.toml")).text();
  const text = new Uint8Array(await (await get("text")).arrayBuffer());
  element("config").textContent = config.trim();
  element("status").textContent = `Training on ${text.length} bytes of text.`;
  const rows = [];
  const losses = await train(config, text, (row) => {
    rows.push(row);
    show(row);
  });
  const names = rows.at(-1).devices.map((device) => device.adapter).join(" and ");
  element("status").textContent = `Done: ${losses.length} steps on ${names}.`;
  await report({ losses: [...losses], rows });
} catch (error) {
  await fail(error.message ?? String(error));
}
