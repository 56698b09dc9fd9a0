// Reads the page of an analysis by keyboard and by touch, without script, and as it is printed.
const {WINDOWS, audit, folder, main} = require("./browser.cjs");

async function look(page, problems, window, name) {
  const still = window.javaScriptEnabled === false;
  if (!still) await page.waitForSelector("body.live");
  const tokens = await page.$$eval(".text:first-of-type i", all => all.map(token => ({
    text: token.textContent, kind: token.className, label: token.getAttribute("aria-label"), tab: token.tabIndex,
    line: getComputedStyle(token).textDecorationLine, style: getComputedStyle(token).textDecorationStyle,
    weight: getComputedStyle(token).fontWeight,
  })));
  const result = {problems, tokens, text: await page.innerText("main")};
  await page.screenshot({path: `${folder}/${name}-whole.png`, fullPage: true});
  if (still) return result;
  await page.focus(".text i");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowLeft");
  result.detail = await page.innerText("#detail");
  await page.screenshot({path: `${folder}/${name}.png`});
  await page[window.hasTouch ? "tap" : "hover"](".text i:nth-child(3)");
  result.pointed = await page.textContent("#detail code");
  Object.assign(result, await audit(page));
  await page.emulateMedia({media: "print"});
  result.printed = await page.evaluate(() => ({
    detail: getComputedStyle(document.getElementById("detail")).display,
    ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor,
  }));
  return result;
}

main(look, {...WINDOWS, still: {viewport: WINDOWS.desktop.viewport, javaScriptEnabled: false}});
