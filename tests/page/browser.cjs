// Opens pages in headless Chromium, in a window of each kind; what the scripts beside it share.
// node SCRIPT URL CHROMIUM FOLDER: prints what it found as JSON; screenshots go into the folder.
const {chromium} = require("playwright-core");
const [url, executablePath, folder] = process.argv.slice(2);
const WINDOWS = {
  desktop: {viewport: {width: 1280, height: 900}, colorScheme: "light"},
  phone: {viewport: {width: 360, height: 780}, colorScheme: "light", hasTouch: true},
  dark: {viewport: {width: 1280, height: 900}, colorScheme: "dark", reducedMotion: "reduce"},
};

async function open(context) {
  const page = await context.newPage(), problems = [];
  page.on("pageerror", error => problems.push(String(error)));
  page.on("dialog", dialog => { problems.push(`dialog: ${dialog.message()}`); dialog.dismiss(); });
  page.on("console", message => message.type() === "error" && problems.push(message.text()));
  page.on("request", request => {
    const asked = request.url();
    if (!asked.startsWith(url) && !asked.startsWith("data:")) problems.push(`external: ${asked}`);
  });
  await page.goto(url);
  return {page, problems};
}

async function audit(page) {
  await page.evaluate(require("fs").readFileSync(require.resolve("axe-core/axe.min.js"), "utf8"));
  const found = await page.evaluate(() => axe.run());
  return {
    violations: found.violations.map(v => [v.id, v.nodes.map(node => node.html)]), passes: found.passes.length,
    overflows: await page.evaluate(() => document.documentElement.scrollWidth > innerWidth),
    background: await page.evaluate(() => getComputedStyle(document.body).backgroundColor),
  };
}

// look(page, problems, window, name) says what it found; for each window.
async function main(look, windows = WINDOWS) {
  // Chromium's sandbox can't be had by root.
  const args = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
  const browser = await chromium.launch({executablePath, args});
  const found = {};
  for (const [name, window] of Object.entries(windows)) {
    const context = await browser.newContext(window);
    const {page, problems} = await open(context);
    found[name] = await look(page, problems, window, name);
    await context.close();
  }
  console.log(JSON.stringify(found));
  await browser.close();
}

module.exports = {WINDOWS, audit, folder, main};
