// What every script that drives the page shares: Chromium with WebGPU on SwiftShader, and what the page says of itself.
// DIST=FOLDER takes another build of the page, CHROMIUM another browser.
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";

export const DIST = process.env.DIST ?? fileURLToPath(new URL("../dist", import.meta.url));
export const ARGS = [
  "--headless=new",
  "--no-sandbox",
  "--disable-gpu",
  "--disable-background-networking",
  "--enable-unsafe-webgpu",
  "--use-webgpu-adapter=swiftshader",
];

export const launch = (args = ARGS) =>
  chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args });

/** Steps done, as the page says. */
export const step = (page) =>
  page.evaluate(() => Number(document.querySelector("#figure-step").textContent.replace(/\D/g, "")));

/** Waits until the page says so many steps. */
export const reach = (page, least) =>
  page.waitForFunction(
    (n) => Number(document.querySelector("#figure-step").textContent.replace(/\D/g, "")) >= n,
    least,
  );

/** Waits until a run is open. */
export const ready = (page) => page.waitForFunction(() => !document.querySelector("#advise").disabled);
