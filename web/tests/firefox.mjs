// The page in Firefox, whose WebGPU is wgpu, on lavapipe: the other engine of browsers. web/dist must be built. FIREFOX names
// another one; LOSSES=FILE has the losses that page.mjs kept, which these must follow.
import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import test from "node:test";
import { firefox } from "playwright-core";
import { serve } from "../serve.mjs";
import { DIST, reach, ready } from "./browser.mjs";

const FIREFOX = process.env.FIREFOX ?? "/usr/bin/firefox-esr";
/** Debian's Firefox has WebGPU, and leaves it off. */
const PREFERENCES = {
  "dom.webgpu.enabled": true,
  "dom.webgpu.workers.enabled": true,
  "gfx.webgpu.ignore-blocklist": true,
};
const STEPS = 4;

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
  page.setDefaultTimeout(180_000);
  const wrong = [];
  page.on("pageerror", (error) => wrong.push(`exception: ${error.message}`));
  page.on("console", (message) => message.type() === "error" && wrong.push(message.text()));

  await t.test("trains on two devices, and agrees with one bit for bit", async () => {
    await page.goto(`${address}#reference=1`);
    await ready(page);
    await page.click("#train");
    /** The step that is shown, which may be a later one, and its loss. */
    const at = async (least) => {
      await reach(page, least);
      return page.evaluate(() =>
        ["step", "loss"].map((name) => Number(document.querySelector(`#figure-${name}`).textContent)),
      );
    };
    const shown = [await at(1), await at(STEPS)];
    assert.ok(shown[1][1] < shown[0][1], `losses ${shown}`);
    assert.match(await page.locator("#agreement").innerText(), /agree bit for bit, and at no step so far less/);
    if (process.env.LOSSES !== undefined) {
      const kept = JSON.parse(readFileSync(process.env.LOSSES, "utf8")).losses;
      for (const [step, loss] of shown) {
        const want = kept[step - 1];
        // Another compiler's exp; and the page shows four digits.
        const allowed = 1e-4 * want + 5e-5;
        assert.ok(Math.abs(loss - want) <= allowed, `step ${step}: ${loss}, ${want} in Chromium`);
      }
    }
    assert.deepEqual(wrong, []);
  });
});
