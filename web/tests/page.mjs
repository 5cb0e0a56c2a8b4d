// The page in Chromium, with the real engine on SwiftShader: what a person does, and what they must see then.
// web/dist must be built. SHOTS=FOLDER keeps pictures at three widths, light and dark; DIST=FOLDER takes another build;
// LOSSES=FILE keeps the losses of fifty steps with the settings that they are for.
import assert from "node:assert/strict";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import test from "node:test";
import { serve } from "../serve.mjs";
import { ARGS, DIST, launch, reach, ready, step } from "./browser.mjs";

/** In the first step of all SwiftShader compiles every kernel, on a machine that may have other work. */
const PATIENCE = 180_000;
/** Kinds of input for which kernels are checked: the first has every op once. */
const CHECKED = 30;
const WIDTHS = [360, 820, 1400];

/** A page that reports whatever it should not do. */
async function visit(browser, address, options = {}) {
  const page = await browser.newPage({ viewport: { width: 1400, height: 900 }, acceptDownloads: true, ...options });
  page.setDefaultTimeout(PATIENCE);
  const wrong = [];
  page.on("pageerror", (error) => wrong.push(`exception: ${error.message}`));
  page.on("console", (message) => {
    // Chromium says of WebGPU on Linux that it is an experiment; that is not the page's.
    const theirs = /experimental/i.test(message.text());
    if (["error", "warning"].includes(message.type()) && !theirs) wrong.push(`${message.type()}: ${message.text()}`);
  });
  page.on("request", (request) => {
    if (!/^(blob|data):/.test(request.url()) && !request.url().startsWith(address))
      wrong.push(`request to ${request.url()}`);
  });
  page.on(
    "response",
    (response) => response.status() >= 400 && wrong.push(`${response.status()} for ${response.url()}`),
  );
  await page.addInitScript(() => {
    window.longest = 0;
    new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) window.longest = Math.max(window.longest, entry.duration);
    }).observe({ type: "longtask" });
  });
  return { page, wrong };
}

const words = (page, id) => page.locator(`#${id}`).innerText();
const number = async (page, id) => Number((await words(page, id)).replace(/[^\d.]/g, ""));
const fragment = (page) => new URLSearchParams(new URL(page.url()).hash.slice(1));

const training = (page) => page.locator("#train").getAttribute("data-state");

async function pause(page) {
  if ((await training(page)) !== "on") return ready(page);
  await page.click("#train");
  await page.waitForFunction(() => /^Paused at step \d+/.test(document.querySelector("#status").textContent));
  await ready(page);
}

const loss = (page) => number(page, "figure-loss");

test("the page", async (t) => {
  const { server, address } = await serve(DIST, { path: "/some/path/" });
  const browser = await launch();
  t.after(async () => {
    await browser.close();
    server.close();
  });
  const { page, wrong } = await visit(browser, address);
  const workers = [];
  page.on("request", (request) => workers.push(request.url()));
  const clean = () => assert.deepEqual(wrong.splice(0), []);

  await t.test("opens ready, with what is simulated and one large button", async () => {
    await page.goto(address);
    await ready(page);
    await page.click("#compare");
    await page.waitForFunction(() => location.hash.includes("reference=1"));
    await ready(page);
    assert.equal(await words(page, "train"), "Train");
    assert.match(await words(page, "simulated-words"), /would stand idle \d+/);
    assert.match(await words(page, "honest"), /physical GPU.*logical device/s);
    clean();
  });

  await t.test("trains: steps are counted, the loss falls", async (own) => {
    await page.evaluate(() => (window.longest = 0));
    await page.click("#train");
    assert.equal(await training(page), "on");
    await reach(page, 1);
    const first = await loss(page);
    await reach(page, 8);
    assert.ok((await loss(page)) < first, `${await loss(page)} after ${first}`);
    assert.match(await words(page, "measured-words"), /stood idle \d+/);
    assert.ok((await number(page, "figure-speed")) > 0);
    const longest = await page.evaluate(() => window.longest);
    // On a machine that does nothing else it should stay under 100 ms.
    own.diagnostic(`the longest task of the page took ${Math.round(longest)} ms`);
    clean();
  });

  await t.test("agrees with one device bit for bit", async () => {
    assert.match(await words(page, "agreement"), /agree bit for bit, and at no step so far less/);
  });

  await t.test("shows what it has learned", async () => {
    await page.waitForFunction(() => document.querySelectorAll("#shown li.right, #shown li.wrong").length > 0);
    assert.match(await words(page, "shown-words"), /% of \d+ questions/);
  });

  await t.test("pauses, does one step, goes on", async () => {
    await pause(page);
    const before = await step(page);
    await page.waitForTimeout(1500);
    assert.equal(await step(page), before, "it rests");
    await page.click("#one");
    await reach(page, before + 1);
    await page.waitForTimeout(1500);
    assert.equal(await step(page), before + 1, "one step and no more");
    await page.click("#train");
    await reach(page, before + 4);
    clean();
  });

  await t.test("freezes a step, goes through its actions and replays it", async () => {
    await page.click("#freeze");
    const held = await page.locator("#timeline").getAttribute("data-step");
    await reach(page, Number(held) + 2);
    assert.equal(await page.locator("#timeline").getAttribute("data-step"), held);
    assert.match(await words(page, "measured-step"), new RegExp(`frozen at step ${held}`));
    const seen = new Set();
    for (let i = 0; i < 5; i++) {
      await page.click("#next");
      await page.waitForTimeout(60);
      seen.add(await words(page, "action"));
    }
    await page.focus("#timeline");
    for (let i = 0; i < 5; i++) {
      await page.keyboard.press("ArrowRight");
      await page.waitForTimeout(60);
      seen.add(await words(page, "action"));
    }
    assert.ok(seen.size >= 8, `ten actions say ${seen.size} things`);
    assert.ok(
      [...seen].some((action) => /^Device \d computes the forward pass of microbatch \d+, stage \d/.test(action)),
      [...seen].join(" | "),
    );
    const device = (await words(page, "action")).slice(0, 8);
    await page.keyboard.press(device === "Device 1" ? "ArrowDown" : "ArrowUp");
    await page.waitForTimeout(60);
    assert.notEqual((await words(page, "action")).slice(0, 8), device, "another lane");
    await page.click("#replay");
    await page.waitForTimeout(900);
    const time = Number(await page.locator("#scrub").inputValue());
    assert.ok(time > 10 && time < 500, `${time} of 1000 after a second`);
    await page.keyboard.press("Escape");
    await page.focus("#timeline");
    await page.keyboard.press("Escape");
    await page.waitForFunction((was) => document.querySelector("#timeline").dataset.step !== was, held);
    clean();
  });

  await t.test("points at a box and says what it is", async () => {
    await pause(page);
    const { width, height } = await page.locator("#measured").boundingBox();
    // A busy machine leaves gaps anywhere, so not in one place alone.
    const named = () => /^Device \d/.test(document.querySelector("#action").textContent);
    let found = false;
    for (let part = 0.2; part < 0.9 && !found; part += 0.05) {
      await page.hover("#measured", { position: { x: width * part, y: height * 0.2 } });
      found = await page.waitForFunction(named, null, { timeout: 2000 }).then(() => true, () => false);
    }
    assert.ok(found, "no box was named");
    await page.mouse.move(5, 5);
  });

  await t.test("moves a cut by keyboard and keeps the weights", async () => {
    const [at, was] = [await step(page), await loss(page)];
    const cut = page.locator('[data-test="cut-1"]');
    const before = Number(await cut.getAttribute("aria-valuenow"));
    await cut.focus();
    await page.keyboard.press("ArrowLeft");
    await page.waitForFunction(() => location.hash.includes("cuts="));
    await ready(page);
    assert.equal(Number(await page.locator('[data-test="cut-1"]').getAttribute("aria-valuenow")), before - 1);
    assert.equal(await step(page), at);
    await page.click("#one");
    await reach(page, at + 1);
    assert.ok(Math.abs((await loss(page)) - was) < 0.5, `${await loss(page)} after ${was}`);
    assert.equal(await words(page, "changes"), `Changed (dotted): step ${at}, another cut.`);
    clean();
  });

  await t.test("makes a device slower, which is measured", async () => {
    await page.locator("#slow-1").focus();
    await page.keyboard.press("End");
    assert.equal(fragment(page).get("slow"), "1,5");
    const at = await step(page);
    await page.click("#train");
    await reach(page, at + 3);
    const idle = await page.evaluate(() =>
      [0, 1].map((rank) =>
        parseFloat(document.querySelectorAll(`[data-test="device-${rank}"] .meter b`)[1].textContent),
      ),
    );
    assert.ok(idle[0] < idle[1], `device 1 is busy ${idle[0]} %, device 2 ${idle[1]} %`);
    clean();
  });

  await t.test("asks the planner and takes its advice over", async () => {
    await pause(page);
    await page.click("#advise");
    await page.waitForSelector("#advice li");
    assert.ok((await words(page, "advice")).length > 20);
    const at = await step(page);
    if ((await page.locator("#take-over").count()) > 0) {
      await page.click("#take-over");
      await ready(page);
      assert.equal(await step(page), at, "with its weights");
    }
    clean();
  });

  await t.test("unplugs a device and goes on with the other", async () => {
    const at = await step(page);
    await page.click("#train");
    await reach(page, at + 2);
    await page.click("#lose-1");
    await page.waitForSelector("#go-on");
    assert.equal(await training(page), "off");
    await page.click("#go-on");
    await reach(page, at + 4);
    assert.equal(fragment(page).get("devices"), "1");
    assert.equal(await page.locator("#devices article").count(), 1);
    await pause(page);
    wrong.length = 0; // a device that is lost is told on the console by the browser
    await page.click("#add-device");
    await page.waitForFunction(() => document.querySelectorAll("#devices article").length === 2);
    await ready(page);
    assert.ok((await step(page)) >= at + 4, "adding one keeps the weights");
    clean();
  });

  await t.test("every setting does what it says", async () => {
    await page.click("#settings summary");
    const set = async (id, value) => {
      await page.selectOption(`#${id}`, value);
      await ready(page);
      await page.waitForTimeout(100);
      await ready(page);
    };
    const values = (id) =>
      page.locator(`#${id} option`).evaluateAll((options) => options.map((option) => option.value));
    for (const schedule of await values("schedule")) {
      await set("schedule", schedule);
      assert.equal(fragment(page).get("schedule"), schedule);
      const at = await step(page);
      await page.click("#one");
      await reach(page, at + 1);
    }
    await set("schedule", "1f1b");
    for (const microbatches of (await values("microbatches")).slice(0, 3)) {
      await set("microbatches", microbatches);
      await page.click("#one");
      await ready(page);
      assert.equal(fragment(page).get("microbatches"), microbatches);
    }
    await page.click("#settings label[for=devices-4]");
    await page.waitForFunction(() => document.querySelectorAll("#devices article").length === 4);
    await ready(page);
    await set("replicas", "2");
    assert.match(await page.locator(".stage-name").first().innerText(), /^Device \d and \d/);
    await page.click("#settings label[for=devices-2]");
    await ready(page);
    assert.ok((await step(page)) > 0, "none of these begins anew");
    await page.fill("#seed", "7");
    await page.keyboard.press("Tab");
    await page.waitForFunction(() => document.querySelector("#figure-step").textContent === "0");
    await ready(page);
    await page.uncheck("#reference");
    await page.waitForFunction(() => location.hash.includes("reference=0"));
    await ready(page);
    await page.click("#one");
    await reach(page, 1);
    assert.match(await words(page, "agreement"), /comparison is off/);
    clean();
  });

  await t.test("learns a text", async () => {
    await page.selectOption("#task", "text");
    await ready(page);
    await page.fill("#text", "a pipeline has stages, and a stage has layers. ".repeat(200));
    await page.locator("#text").blur();
    await page.waitForTimeout(200);
    await ready(page);
    await page.click("#one");
    await page.waitForFunction(() => document.querySelector("#shown .sample")?.textContent.length > 0);
    clean();
  });

  await t.test("resets", async () => {
    await page.click("#reset");
    await page.waitForFunction(() => document.querySelector("#figure-step").textContent === "0");
    await ready(page);
    assert.equal(await words(page, "train"), "Train");
    assert.equal(await words(page, "figure-loss"), "–");
  });

  await t.test("hands out the trace and the model", async () => {
    await page.click("#one");
    await reach(page, 1);
    await page.waitForFunction(() => !document.querySelector("#download-trace").disabled);
    for (const [button, right] of [
      ["#download-trace", (content) => JSON.parse(content.toString()).traceEvents.length > 0],
      ["#download-model", (content) => content.subarray(0, 2).toString() === "PK"],
    ]) {
      const [file] = await Promise.all([page.waitForEvent("download"), page.click(button)]);
      assert.ok(right(readFileSync(await file.path())), button);
    }
    clean();
  });

  await t.test("checks kernels against the reference in 64-bit floats, until it is stopped", async (own) => {
    await page.click("#verify");
    await page.waitForFunction((enough) => document.querySelector("#checked").value >= enough, CHECKED);
    await page.click("#verify");
    await page.waitForFunction(() => document.querySelector("#checking").hidden);
    const outcome = await words(page, "keep-words");
    assert.match(outcome, /^Stopped\. \d+ kernels in \d+ cases: all within their tolerance\.$/);
    own.diagnostic(outcome);
    clean();
  });

  await page.close();

  await t.test("one, two and three devices agree bit for bit, step by step", async () => {
    // The engine without the page, on one that has nothing to do.
    const { page: plain } = await visit(browser, address);
    await plain.goto(`${address}icon.svg`);
    const worker = workers.find((url) => /worker/.test(url));
    const kept = await plain.evaluate(async (url) => {
      const engine = new Worker(url, { type: "module" });
      let id = 0;
      const ask = (request) =>
        new Promise((resolve, reject) => {
          const own = ++id;
          engine.addEventListener("message", function hear({ data }) {
            if (data.id !== own) return;
            engine.removeEventListener("message", hear);
            if (data.failure === undefined) resolve(data);
            else reject(new Error(data.failure.message));
          });
          engine.postMessage({ id: own, ...request });
        });
      const { catalog } = await ask({ ask: "catalog" });
      const runs = [];
      for (const [devices, steps] of [[2, 50], [1, 5], [3, 5]]) {
        const settings = { ...catalog.defaults, devices, cuts: [] };
        await ask({ ask: "open", settings, keep: false });
        const losses = [];
        for (let step = 0; step < steps; step++) losses.push((await ask({ ask: "step" })).stepped.loss);
        runs.push({ settings, losses });
      }
      engine.terminate();
      return runs;
    }, worker);
    const [two, one, three] = kept;
    assert.deepEqual(one.losses, two.losses.slice(0, 5));
    assert.deepEqual(three.losses, two.losses.slice(0, 5));
    if (process.env.LOSSES !== undefined) writeFileSync(process.env.LOSSES, JSON.stringify(two));
    await plain.close();
    clean();
  });

  await t.test("an address brings its settings, and wrong ones are told", async () => {
    const { page, wrong } = await visit(browser, address);
    await page.goto(`${address}#devices=3&schedule=gpipe&microbatches=4&seed=5&size=none&slow=1,9,1`);
    await ready(page);
    await page.click("#settings summary");
    assert.equal(await page.locator("#schedule").inputValue(), "gpipe");
    assert.equal(await page.locator("#microbatches").inputValue(), "4");
    assert.equal(await page.locator("#seed").inputValue(), "5");
    assert.equal(await page.locator("#devices article").count(), 3);
    assert.match(await words(page, "notices"), /“size”.*“slow”/s);
    await page.click("#copy-link");
    const link = page.url();
    assert.equal(fragment(page).get("devices"), "3");
    const again = await visit(browser, address);
    await again.page.goto(link);
    await ready(again.page);
    await again.page.click("#copy-link");
    assert.equal(again.page.url(), link);
    assert.deepEqual([...wrong, ...again.wrong], []);
    await page.close();
    await again.page.close();
  });

  await t.test("without WebGPU it says what to do, and does not get stuck", async () => {
    const without = ARGS.filter((arg) => !/webgpu/.test(arg)).concat("--disable-features=WebGPU,WebGPUService");
    const plain = await launch(without);
    t.after(() => plain.close());
    const page = await plain.newPage();
    page.setDefaultTimeout(PATIENCE);
    await page.goto(address);
    await page.waitForSelector(".notice.bad");
    assert.match(await words(page, "notices"), /WebGPU/);
    assert.ok(await page.locator("#try-again").isEnabled());
  });

  await t.test("stands still where motion is reduced, and fits every width", async () => {
    if (process.env.SHOTS) mkdirSync(process.env.SHOTS, { recursive: true });
    const shot = (name, options) =>
      process.env.SHOTS && page.screenshot({ path: join(process.env.SHOTS, `${name}.png`), ...options });
    const { page, wrong } = await visit(browser, address, { reducedMotion: "reduce" });
    await page.goto(`${address}#devices=3`);
    await ready(page);
    await page.click("#train");
    await reach(page, 4);
    await pause(page);
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme });
      for (const width of WIDTHS) {
        await page.setViewportSize({ width, height: 900 });
        await page.waitForTimeout(400);
        const over = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
        assert.ok(over <= 0, `${over} px too wide at ${width}`);
        await shot(`${colorScheme}-${width}`, { fullPage: true });
      }
      // The picture of the README: down to the end of the simulated step.
      const end = await page.evaluate(() => document.querySelector("#simulated").getBoundingClientRect().bottom + scrollY);
      await shot(`page-${colorScheme}`, { clip: { x: 100, y: 0, width: 1200, height: end + 14 }, fullPage: true });
    }
    await page.click("#replay");
    await page.waitForTimeout(700);
    assert.equal(await page.locator("#scrub").inputValue(), "0");
    assert.deepEqual(wrong, []);
    await page.close();
  });
});
