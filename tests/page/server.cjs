// Uses the server's page by keyboard alone, in a window of each kind.
const {audit, folder, main} = require("./browser.cjs");

async function look(page, problems, window, name) {
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
  if (window.hasTouch) {
    await page.tap("#proxy-text .token:nth-child(3)");
    tapped = await page.textContent("#detail code");
  } else {
    await page.hover("#proxy-text .token:nth-child(3)");
    tapped = await page.textContent("#detail code");
  }
  return {
    problems, order, temperature, status, base, count, tokens, detail, tapped, ...await audit(page),
    animation: await page.evaluate(() => {
      const text = document.getElementById("base-text");
      text.classList.add("busy");
      return getComputedStyle(text, "::after").animationName;
    }),
  };
}

main(look);
