// The page in Firefox, whose WebGPU is wgpu, on lavapipe: the other engine of browsers. web/dist must be built. FIREFOX names
// another one; LOSSES=FILE has the losses that page.mjs kept, which these must follow.
import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import test from "node:test";
import { firefox } from "playwright-core";
import { serve } from "../serve.mjs";
import { DIST, ready } from "./browser.mjs";

const FIREFOX = process.env.FIREFOX ?? "/usr/bin/firefox-esr";
/** Debian's Firefox has WebGPU, and leaves it off. */
const PREFERENCES = {
  "dom.webgpu.enabled": true,
  "dom.webgpu.workers.enabled": true,
  "gfx.webgpu.ignore-blocklist": true,
};
const STEPS = 4;
const PATIENCE = 180_000;

test("the page in Firefox", { skip: !existsSync(FIREFOX) && `there is no ${FIREFOX}` }, async (t) => {
  const { server, address } = await serve(DIST, { path: "/some/path/" });
  const browser = await firefox.launch({
    channel: "moz-firefox",
    executablePath: FIREFOX,
    firefoxUserPrefs: PREFERENCES,
  });
  t.after(async () => {
    await browser.close();
    server.close();
  });
  const page = await browser.newPage({ viewport: { width: 1400, height: 900 } });
  page.setDefaultTimeout(PATIENCE);
  const wrong = [];
  page.on("pageerror", (error) => wrong.push(`exception: ${error.message}`));
  page.on("console", (message) => message.type() === "error" && wrong.push(message.text()));

  await t.test("trains on two devices, and agrees with one bit for bit", async () => {
    await page.goto(`${address}#reference=1`);
    await ready(page);
    await page.click("#train");
    // Read from here: what waits inside the page does not return under this protocol.
    const losses = [];
    const until = Date.now() + PATIENCE;
    while (losses.filter(Boolean).length < STEPS) {
      assert.ok(Date.now() < until, `only losses ${losses}: ${await page.locator("#status").innerText()}`);
      await page.waitForTimeout(100);
      const [step, loss] = await page.evaluate(() =>
        ["step", "loss"].map((name) => Number(document.querySelector(`#figure-${name}`).textContent)),
      );
      if (step > 0) losses[step - 1] = loss;
    }
    assert.ok(losses.at(-1) < losses[0], `losses ${losses}`);
    assert.match(await page.locator("#agreement").innerText(), /agree bit for bit, and at no step so far less/);
    if (process.env.LOSSES !== undefined) {
      const kept = JSON.parse(readFileSync(process.env.LOSSES, "utf8")).losses;
      losses.forEach((loss, step) => {
        // Another compiler's exp; and the page shows four digits.
        const allowed = 1e-4 * kept[step] + 5e-5;
        assert.ok(Math.abs(loss - kept[step]) <= allowed, `step ${step + 1}: ${loss}, ${kept[step]} in Chromium`);
      });
    }
    assert.deepEqual(wrong, []);
  });
});
