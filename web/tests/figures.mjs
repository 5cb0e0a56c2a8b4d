// What the page is measured by, on a machine that does nothing else: `node web/tests/figures.mjs` after `make web`. How long a
// cold browser takes from the address to the end of the first step, the longest task of the page's thread while it trains, and
// how the share of right sums rises. MINUTES=10 says for how long it learns, 0 that it does not.
import { serve } from "../serve.mjs";
import { DIST, launch, reach, ready, step } from "./browser.mjs";

const minutes = Number(process.env.MINUTES ?? 10);
const { server, address } = await serve(DIST);

/** A browser that has never seen the page; what is done with the page there. */
async function fresh(doing) {
  const browser = await launch();
  const page = await browser.newPage({ viewport: { width: 1400, height: 900 } });
  page.setDefaultTimeout(120_000);
  await page.addInitScript(() => {
    globalThis.longest = 0;
    const note = (list) => list.getEntries().forEach((task) => (globalThis.longest = Math.max(globalThis.longest, task.duration)));
    new PerformanceObserver(note).observe({ entryTypes: ["longtask"] });
  });
  const begun = Date.now();
  await page.goto(address);
  await page.click("#train");
  await reach(page, 1);
  const seconds = (Date.now() - begun) / 1000;
  await doing(page, seconds, () => (Date.now() - begun) / 1000);
  await browser.close();
}

for (let load = 1; load <= Number(process.env.LOADS ?? 3); load += 1) {
  await fresh(async (page, seconds) => {
    await ready(page);
    await page.waitForTimeout(20_000);
    const longest = await page.evaluate(() => globalThis.longest);
    // A task under 50 ms is none that the browser tells.
    console.log(`load ${load}: first step after ${seconds.toFixed(1)} s, longest task ${longest.toFixed(0)} ms`);
  });
}
if (minutes > 0) {
  await fresh(async (page, _, elapsed) => {
    while (elapsed() < 60 * minutes) {
      await page.waitForTimeout(30_000);
      const words = await page.locator("#shown-words").innerText();
      console.log(`${elapsed().toFixed(0)} s, ${await step(page)} steps: ${words}`);
    }
    const longest = await page.evaluate(() => globalThis.longest);
    console.log(`longest task in all of it: ${longest.toFixed(0)} ms`);
  });
}
server.close();
