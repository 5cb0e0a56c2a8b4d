// Everything on the page at random for some minutes: MINUTES=10 SEED=1 node web/tests/monkey.mjs. It ends with an error if the
// page throws, if it is stuck at the end, or if the browser's memory grows from the middle third of the time to the last.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { serve } from "../serve.mjs";
import { DIST, launch, reach, ready } from "./browser.mjs";

const minutes = Number(process.env.MINUTES ?? 10);
/** The driver's own memory wanders by as much while kernels are compiled. */
const GROWTH = 1.25;

/** Mulberry32. */
let state = Number(process.env.SEED ?? 1) >>> 0;
function random(n) {
  state = (state + 0x6d2b79f5) >>> 0;
  let t = Math.imul(state ^ (state >>> 15), state | 1);
  t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
  return Math.floor((((t ^ (t >>> 14)) >>> 0) / 4294967296) * n);
}

/** Resident bytes of all processes of the browser that this one started. */
function memory() {
  let bytes = 0;
  for (const id of readdirSync("/proc").filter((name) => /^\d+$/.test(name))) {
    try {
      if (!readFileSync(`/proc/${id}/cmdline`, "latin1").includes("chromium")) continue;
      bytes += 4096 * Number(readFileSync(`/proc/${id}/statm`, "utf8").split(" ")[1]);
    } catch {
      // It has ended since the list was made.
    }
  }
  return bytes;
}

const { server, address } = await serve(DIST);
const browser = await launch();
const page = await browser.newPage({ viewport: { width: 1400, height: 900 }, acceptDownloads: true });
const thrown = [];
page.on("pageerror", (error) => thrown.push(error.message));
await page.goto(address);
await page.click("#settings summary");

const CONTROLS = "button, select, input, summary, [role=slider]";
const [samples, done] = [[], {}];
const begun = Date.now();
while (Date.now() - begun < minutes * 60_000) {
  const controls = await page.locator(CONTROLS).all();
  const control = controls[random(controls.length)];
  const options = { timeout: 1500 };
  try {
    const kind = await control.evaluate((e) => e.getAttribute("role") ?? e.type ?? e.tagName, null, options);
    const id = (await control.getAttribute("id", options)) ?? kind;
    done[id] = (done[id] ?? 0) + 1;
    if (kind === "select-one") {
      const count = await control.locator("option").count();
      await control.selectOption({ index: random(count) }, options);
    } else if (kind === "slider" || kind === "range") {
      await control.focus(options);
      await page.keyboard.press(["ArrowLeft", "ArrowRight", "Home", "End"][random(4)]);
    } else if (kind === "number") {
      await control.fill(String(random(5)), options);
      await page.keyboard.press("Tab");
    } else {
      await control.click(options);
    }
  } catch (error) {
    // Controls are disabled while a run opens, and come and go with devices.
    if (!/Timeout|not attached|not visible|detached/i.test(error.message)) throw error;
  }
  await page.waitForTimeout(random(1500));
  samples.push(memory());
}
assert.deepEqual(thrown, []);

// Whatever state that left: from the beginning, it trains.
await page.goto("about:blank");
await page.goto(address);
page.setDefaultTimeout(120_000);
await ready(page);
await page.click("#train");
await reach(page, 3);
assert.deepEqual(thrown, []);
const third = Math.floor(samples.length / 3);
const mean = (list) => list.reduce((sum, x) => sum + x, 0) / list.length / 2 ** 20;
const [middle, last] = [mean(samples.slice(third, 2 * third)), mean(samples.slice(2 * third))];
console.log(`${samples.length} actions on ${Object.keys(done).length} controls; ${middle.toFixed(0)} MiB, then ${last.toFixed(0)} MiB`);
assert.ok(last < GROWTH * middle, `memory grew from ${middle.toFixed(0)} to ${last.toFixed(0)} MiB`);
await browser.close();
server.close();
