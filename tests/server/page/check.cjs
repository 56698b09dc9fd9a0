// Uses the page by keyboard alone, in a window of each kind; prints what it found as JSON.
// node check.cjs URL CHROMIUM FOLDER: screenshots go into the folder.
const {chromium} = require("playwright-core");
const [url, executablePath, folder] = process.argv.slice(2);
const WINDOWS = {
  desktop: {viewport: {width: 1280, height: 900}, colorScheme: "light"},
  phone: {viewport: {width: 360, height: 780}, colorScheme: "light", hasTouch: true},
  dark: {viewport: {width: 1280, height: 900}, colorScheme: "dark", reducedMotion: "reduce"},
};

async function look(browser, name) {
  const context = await browser.newContext(WINDOWS[name]);
  const page = await context.newPage(), problems = [];
  page.on("pageerror", error => problems.push(String(error)));
  page.on("console", message => message.type() === "error" && problems.push(message.text()));
  page.on("request", request => {
    const asked = request.url();
    if (!asked.startsWith(url) && !asked.startsWith("data:")) problems.push(`external: ${asked}`);
  });
  await page.goto(url);
  await page.waitForFunction(() => document.getElementById("status").textContent === "Ready.");
  const focused = () => page.evaluate(() => document.activeElement.id || document.activeElement.tagName);
  const order = [];
  for (let i = 0; i < 20 && order.at(-1) !== "go"; i++) {
    await page.keyboard.press("Tab");
    order.push(await focused());
    if (order.at(-1) === "temperature") await page.keyboard.press("ArrowLeft");
  }
  const temperature = await page.textContent("#temperature-value");
  await page.keyboard.press("Enter");
  await page.waitForFunction(() => /^(Done|It failed)/.test(document.getElementById("status").textContent), null, {timeout: 60000});
  const status = await page.textContent("#status");
  const base = await page.textContent("#base-text");
  const count = await page.textContent("#base-count");
  const tokens = await page.$$eval("#proxy-text .token", all => all.map(token => ({
    text: token.textContent, label: token.getAttribute("aria-label"), tab: token.tabIndex,
    line: getComputedStyle(token).textDecorationLine, kind: getComputedStyle(token).textDecorationStyle,
    moved: Math.log2(token.known.steering.proxy / token.known.steering.base),
  })));
  // Stop is not to be reached now; the next place is the text, whose tokens share one stop of Tab.
  await page.keyboard.press("Tab");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowLeft");
  const detail = await page.textContent("#detail");
  await page.screenshot({path: `${folder}/${name}.png`, fullPage: true});
  let tapped = null;
  if (WINDOWS[name].hasTouch) {
    await page.tap("#proxy-text .token:nth-child(3)");
    tapped = await page.textContent("#detail code");
  } else {
    await page.hover("#proxy-text .token:nth-child(3)");
    tapped = await page.textContent("#detail code");
  }
  await page.evaluate(require("fs").readFileSync(require.resolve("axe-core/axe.min.js"), "utf8"));
  const found = await page.evaluate(() => axe.run());
  const result = {
    problems, order, temperature, status, base, count, tokens, detail, tapped,
    violations: found.violations.map(v => [v.id, v.nodes.map(node => node.html)]), passes: found.passes.length,
    overflows: await page.evaluate(() => document.documentElement.scrollWidth > innerWidth),
    animation: await page.evaluate(() => {
      const text = document.getElementById("base-text");
      text.classList.add("busy");
      return getComputedStyle(text, "::after").animationName;
    }),
    background: await page.evaluate(() => getComputedStyle(document.body).backgroundColor),
  };
  await context.close();
  return result;
}

(async () => {
  // Chromium's sandbox can't be had by root.
  const args = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
  const browser = await chromium.launch({executablePath, args});
  const found = {};
  for (const name of Object.keys(WINDOWS)) found[name] = await look(browser, name);
  console.log(JSON.stringify(found));
  await browser.close();
})();
